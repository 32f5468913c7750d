"""An SCGI connection on stdin and stdout for a CGI program: scgi.py PROGRAM [ARG...]

The headers become its environment, the body is what is left on stdin; what a CGI program
answers is what SCGI wants.  So nothing stays of this program.
"""

import os
import sys

length = b""
while (byte := os.read(0, 1)) != b":":  # no byte more: the body is PROGRAM's
    length += byte or sys.exit("no SCGI request")
headers = b""
while len(headers) < int(length) + 1:  # and a comma
    headers += os.read(0, int(length) + 1 - len(headers)) or sys.exit("half an SCGI request")
words = headers[:-1].split(b"\0")[:-1]
environment = {**os.environb, **dict(zip(words[::2], words[1::2], strict=True))}
os.execvpe(sys.argv[1], sys.argv[1:], environment)
