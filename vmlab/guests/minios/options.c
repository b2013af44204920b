/* options.c: the kernel's command line: words `name=value`; others are left alone. Called by main.c, and by who has one. */
#include "kernel.h"
#include "text.h"

static char line[256];

/* A loader may have left it anywhere, behind the image too, where pages.c takes memory from. */
void options_init(void)
{
    const char *from = command_line;
    for (word i = 0; i + 1 < sizeof line && from[i]; i++)
        line[i] = from[i];
    command_line = line;
}

u32 option_number(const char *key, u32 otherwise) { return find_number(line, key, otherwise); }
