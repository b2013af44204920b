/* schedule.c: who runs next: each runnable process in turn, a tick at most. Called wherever a process stops.
 *
 * The kernel itself is not preempted: a tick only asks for a switch, which happens on the way back to user mode.
 * Interrupt handlers make processes runnable, so the queue is changed with interrupts off. */
#include "kernel.h"

volatile int want_switch;
static struct queue runnable;

static void append(struct queue *queue, struct process *process)
{
    process->next = 0;
    if (queue->first)
        queue->last->next = process;
    else
        queue->first = process;
    queue->last = process;
}

static struct process *take(struct queue *queue)
{
    struct process *process = queue->first;
    if (process)
        queue->first = process->next;
    return process;
}

void make_runnable(struct process *process)
{
    word flags = irq_save();
    process->state = RUNNABLE;
    append(&runnable, process);
    irq_restore(flags);
}

void schedule(void)
{
    static word nowhere;                /* the boot stack is never needed again */
    struct process *old = current, *next;
    while (!(next = take(&runnable))) { /* idle, on the stack of who stopped last */
        halt();
        cli();
    }
    want_switch = 0;
    if (next == old)
        return;
    current = next;
    set_stack(next->stack_top);
    load_cr3(next->space.root);
    counts.cr3_loads++;
    switch_stack(old ? &old->stack : &nowhere, next->stack);
}

void wait_on(struct queue *queue)
{
    current->state = WAITING;
    append(queue, current);
    schedule();
}

/* All that wait on the queue may run: each looks again whether what it waits for is there. */
void wake(struct queue *queue)
{
    struct process *process;
    word flags = irq_save();
    while ((process = take(queue)))
        make_runnable(process);
    irq_restore(flags);
}

void yield(void)
{
    make_runnable(current);
    schedule();
}
