#!/bin/sh
# A CGI program: says what it was asked, and repeats the body.  That is read first: nginx sends no
# more of it once there is an answer.
body=$(head -c "${CONTENT_LENGTH:-0}")
printf 'Status: 200 OK\r\nContent-Type: text/plain\r\n\r\n'
printf '%s %s from %s\n%s' "$REQUEST_METHOD" "$REQUEST_URI" "$PPID" "$body"
