/* The same answer as a program for one connection, which is stdin and stdout.
 *
 * The pid in it is the parent's, which lives as long as its generation.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(void)
{
    char word[32] = "", number[32] = "", request[4096], body[64];
    size_t got = 0;
    FILE *file = fopen(getenv("RELEASE"), "r");

    if (file == NULL || fscanf(file, "%31s %31s", word, number) != 2 || strcmp(word, "broken") == 0)
        return 3;
    while (got < sizeof request - 1) {
        ssize_t more = read(0, request + got, sizeof request - 1 - got);
        if (more <= 0)
            return 0;
        got += (size_t)more;
        request[got] = '\0';
        if (strstr(request, "\r\n\r\n") != NULL)
            break;
    }
    int bad = strcmp(word, "answers-500") == 0;
    int length = snprintf(body, sizeof body, "%d %s %s", (int)getppid(), number, bad ? "fail" : "pong");
    printf("HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s",
           bad ? "500 Internal Server Error" : "200 OK", length, body);
    return 0;
}
