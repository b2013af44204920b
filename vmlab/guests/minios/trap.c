/* trap.c: everything that enters the kernel: exceptions, interrupts, system calls. Called by entry32.S and entry64.S. */
#include "kernel.h"

word kernel_fixup;

static void fatal(const struct frame *frame, word address)
{
    print("minios: exception %u error code %x at %x address %x\n", (u32)frame->vector, (u32)frame->error, (u32)frame->ip, (u32)address);
    shut_down(2);
}

/* A task of its own in 32-bit mode (tables.c): the kernel's stack may be what is at fault. */
void double_fault(void)
{
    print("minios: double fault\n");
    shut_down(2);
}

/* An exception that nobody mends: the program's own handler, its end, or the kernel's. */
static void exception(struct frame *frame, word address)
{
    if (from_user(frame)) {
        if (!current->on_fault)
            process_exit(0xdead0000 | frame->vector);
        frame->ip = current->on_fault;
    } else if (kernel_fixup) {
        frame->ip = kernel_fixup;
    } else {
        fatal(frame, address);
    }
}

static void page_fault(struct frame *frame)
{
    word address = read_cr2();
    counts.faults++;
    if (address < USER || address >= USER_END || !current || !space_fault(&current->space, address, frame->error))
        exception(frame, address);
}

/* IRQ 0..15 through the 8259s. 7 may be spurious and is used by nobody. */
static void interrupt(word irq)
{
    if (irq == 7)
        return;
    if (irq >= 8)
        out_byte(0xa0, 0x20);
    out_byte(0x20, 0x20);               /* end of interrupt */
    counts.interrupts++;
    if (irq == 0)
        timer_interrupt();
    else if (irq == 11)
        disk_interrupt();
}

void trap(struct frame *frame)
{
    if (frame->vector == 0x80) {
        counts.system_calls++;
        frame->ax = system_call(frame);
        cli();
    } else if (frame->vector == 14) {
        page_fault(frame);
    } else if (frame->vector == 8) {
        double_fault();
    } else if (frame->vector >= 0x20) {
        interrupt(frame->vector - 0x20);
    } else {
        exception(frame, 0);
    }
    if (want_switch && from_user(frame))
        yield();
}
