/* text.h: a number out of a line of words, and words out of numbers. For the kernel and for user programs. */
#pragma once
#include <stdarg.h>
#include "types.h"

/* Where the value of `key` ("name=") begins in a line of words, or 0. */
static inline const char *find_option(const char *line, const char *key)
{
    while (*line) {
        const char *at = line, *k = key;
        while (*k && *at == *k)
            at++, k++;
        if (!*k)
            return at;
        while (*line && *line++ != ' ')
            ;
    }
    return 0;
}

static inline u32 find_number(const char *line, const char *key, u32 otherwise)
{
    const char *at = find_option(line, key);
    u32 value = 0;
    if (!at || *at < '0' || *at > '9')
        return otherwise;
    for (; *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (*at - '0');
    return value;
}

/* Whether the word at `text`, which ends in a blank or in NUL, is `name`. */
static inline int is_word(const char *text, const char *name)
{
    while (*name && *text == *name)
        text++, name++;
    return !*name && (*text == ' ' || !*text);
}

/* %s, %u and %x (8 digits) into `out`; gives the length. */
static inline word format_list(char *out, const char *format, va_list list)
{
    char *at = out, digits[10];
    for (; *format; format++) {
        if (*format != '%') {
            *at++ = *format;
            continue;
        }
        if (*++format == 's') {
            for (const char *s = va_arg(list, const char *); *s; s++)
                *at++ = *s;
            continue;
        }
        u32 value = va_arg(list, u32), base = *format == 'x' ? 16 : 10, n = 0;
        do
            digits[n++] = "0123456789abcdef"[value % base];
        while ((value /= base) || (base == 16 && n < 8));
        while (n)
            *at++ = digits[--n];
    }
    return at - out;
}
