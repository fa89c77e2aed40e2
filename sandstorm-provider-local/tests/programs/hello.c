#include <math.h>
#include <stdio.h>
#include <string.h>

int main(int count, char **words) {
    char line[64];
    if (fgets(line, sizeof line, stdin) == NULL || sqrt(count) > 2)
        return 1;
    line[strcspn(line, "\n")] = 0;
    printf("hello %s ", line);
    for (int i = 1; i < count; i++)
        printf(i == 1 ? "%s" : ",%s", words[i]);
    printf("\n");
    fprintf(stderr, "warned\n");
    return 3;
}
