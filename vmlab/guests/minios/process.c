/* process.c: how processes come, change and go. Called by main.c and syscall.c; switching between them is schedule.c. */
#include "kernel.h"

struct process processes[PROCESSES], *current;
word user_code = USER_CODE, user_data = USER_DATA;
static u32 last_id;

extern u8 user_entry[], fork_return[];

static struct process *process_new(void)
{
    for (struct process *process = processes; process < processes + PROCESSES; process++)
        if (process->state == UNUSED) {
            process->state = WAITING;
            process->id = ++last_id;
            process->parent = current;
            return process;
        }
    return 0;
}

static struct frame *frame_of(struct process *process) { return (struct frame *)process->stack_top - 1; }

/* Let it run for the first time: switch_stack pops registers and goes to fork_return, which finds the frame. */
static void begin(struct process *process)
{
    word *stack = (word *)frame_of(process);
    *--stack = (word)fork_return;
    for (int i = 0; i < (sizeof(word) == 8 ? 6 : 4); i++)
        *--stack = 0;
    process->stack = (word)stack;
    make_runnable(process);
}

static void start(struct frame *frame, word program, word argument)
{
    for (word *at = (word *)frame; at < (word *)(frame + 1); at++)
        *at = 0;
    frame->ip = (word)user_entry;
    frame->cs = user_code;
    frame->flags = FLAG_IF | 2;
    frame->sp = USER_END;
    frame->ss = user_data;
#ifdef __x86_64__
    frame->di = program;        /* the first two arguments of a C function */
    frame->si = argument;
#else
    frame->ax = program;
    frame->dx = argument;
#endif
}

void process_first(void)
{
    struct process *process = process_new();
    space_new(&process->space);
    space_program(&process->space);
    start(frame_of(process), 0, 0);
    begin(process);
}

word process_fork(struct frame *frame)
{
    struct process *child = process_new();
    if (!child)
        return -1;
    counts.forks++;
    space_fork(&child->space, &current->space);
    child->on_fault = current->on_fault;
    copy(frame_of(child), frame, sizeof *frame);
    frame_of(child)->ax = 0;
    word id = child->id;
    begin(child);
    return id;
}

void process_exec(struct frame *frame, word program, word argument)
{
    struct space old;
    copy(&old, &current->space, sizeof old);
    space_new(&current->space);
    space_program(&current->space);
    load_cr3(current->space.root);
    counts.cr3_loads++;
    space_clear(&old);
    space_free(&old);
    current->on_fault = 0;
    start(frame, program, argument);
}

void process_exit(word result)
{
    if (current == processes) {         /* the first process: its end is the end of the run */
        outcome_print();
        shut_down(result);
    }
    space_clear(&current->space);       /* its pages go now, while its tables are in use; the tables when the parent waits */
    cli();
    for (struct process *process = processes; process < processes + PROCESSES; process++)
        if (process->parent == current)
            process->parent = processes;
    current->result = result;
    current->state = DEAD;
    wake(&current->parent->children_gone);
    schedule();
    __builtin_unreachable();
}

word process_wait(void)
{
    for (;;) {
        int any = 0;
        for (struct process *process = processes; process < processes + PROCESSES; process++) {
            if (process->state == UNUSED || process->parent != current || process == current)
                continue;
            any = 1;
            if (process->state == DEAD) {
                space_free(&process->space);
                process->state = UNUSED;
                return process->result;
            }
        }
        if (!any)
            return -1;
        cli();
        wait_on(&current->children_gone);
        sti();
    }
}
