/* library.c: what programs share. */
#include "../text.h"
#include "user.h"

u32 option(const char *key, u32 otherwise)
{
    char line[256];
    call(CALL_COMMAND_LINE, (word)line, sizeof line, 0);
    return find_number(line, key, otherwise);
}

void say(const char *format, ...)
{
    char line[128];
    va_list list;
    va_start(list, format);
    word length = format_list(line, format, list);
    va_end(list);
    call(CALL_PRINT, (word)line, length, 0);
}

void fail(const char *why)
{
    say("minios: FAILED: %s\n", why);
    exit(1);
}

void begin(void)
{
    call(CALL_BEGIN, 0, 0, 0);
    vmlab_roi_begin();
}

void end(u32 operations, u32 iterations, u32 checksum)
{
    vmlab_roi_end();
    call(CALL_END, 0, 0, 0);
    call(CALL_REPORT, operations, iterations, checksum);
}

word pages_new(word pages)
{
    word at = map(0, pages, READ_WRITE);
    if (!at)
        fail("no room to map so many pages");
    for (word page = 0; page < pages; page++)
        *(volatile u32 *)(at + page * PAGE) = page;
    return at;
}

u32 mix(u32 sum, u32 value) { return (sum << 5 | sum >> 27) ^ value; }

/* xorshift32 (Marsaglia 2003) */
u32 next_random(u32 *state)
{
    u32 x = *state;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}

int read_all(word pipe, void *to, word count)
{
    for (u8 *at = to; count;) {
        word got = call(CALL_READ, pipe, (word)at, count);
        if ((long)got <= 0)
            return 0;
        at += got;
        count -= got;
    }
    return 1;
}

void write_all(word pipe, const void *from, word count)
{
    if (call(CALL_WRITE, pipe, (word)from, count) != count)
        fail("a pipe took too little");
}
