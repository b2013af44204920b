/* console.c: text to the serial port, and the end of the run. A line goes out whole (one hypercall when paravirtual). */
#include "kernel.h"
#include "text.h"

/* UART (PC16550D data sheet): transmitter 0x3f8, line status 0x3fd; bit 5: it takes a character, bit 6: all are out. */
void console_send(const char *text, word length)
{
    while (length--) {
        while (!(in_byte(0x3fd) & 0x20))
            ;
        out_byte(0x3f8, *text++);
    }
    while (!(in_byte(0x3fd) & 0x40))
        ;
}

void print(const char *format, ...)
{
    static char line[512];
    va_list list;
    va_start(list, format);
    word length = format_list(line, format, list);
    va_end(list);
    const char *text = line;
#ifdef __x86_64__
    asm volatile(SITE(K_CONSOLE, ROOM_CALL, "call console_send") : "+D"(text), "+S"(length) :: CALL_CLOBBERS);
#else
    asm volatile(SITE(K_CONSOLE, ROOM_CALL, "call console_send") : "+a"(text), "+d"(length) :: "ecx", "memory", "cc");
#endif
}

void shut_down(u32 code)
{
    out_word(0xf4, code);
    for (;;)
        halt();             /* only where no debug-exit device listens */
}
