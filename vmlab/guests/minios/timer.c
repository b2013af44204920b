/* timer.c: the 8254's channel 0 gives a tick every `timer` nanoseconds (0: no ticks). Called by main.c and trap.c. */
#include "kernel.h"

volatile word ticks;
static struct queue sleepers;

/* Intel 8254 data sheet: control word 0x34: channel 0, both bytes, mode 2. It counts at 1 193 182 Hz, 838 ns a step. */
void timer_init(void)
{
    u32 period = option_number("timer=", 0) / 838;
    if (!period)
        return;
    period = period < 2 ? 2 : period > 65535 ? 65535 : period;
    out_byte(0x43, 0x34);
    out_byte(0x40, period & 0xff);
    out_byte(0x40, period >> 8);
    for (word i = option_number("phase=", 0) / 2; i; i--)   /* where in a period the work begins: two instructions a step */
        asm volatile("");
}

void timer_interrupt(void)
{
    ticks++;
    wake(&sleepers);
    want_switch = 1;
}

void sleep(word count)
{
    word until = ticks + count;
    cli();
    while ((long)(until - ticks) > 0)
        wait_on(&sleepers);
    sti();
}
