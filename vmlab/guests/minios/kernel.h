/* kernel.h: what the kernel's files offer each other, in reading order. */
#pragma once
#include "counts.h"
#include "cpu.h"
#include "frame.h"
#include "types.h"

/* start32.S, start64.S, or the paravirtual entry: set before main() */
extern word memory_end;                         /* first byte behind physical memory */
extern word memory_start;                       /* first byte that nobody uses */
extern const char *command_line;
extern u64 kernel_table[], boot_root[];

/* tables.c: native only */
void native_setup(void);
void forget_idt(void);

/* console.c */
void print(const char *format, ...);            /* %s %u %x */
void console_send(const char *text, word length);
void shut_down(u32 code) __attribute__((noreturn));

/* options.c */
void options_init(void);
u32 option_number(const char *key, u32 otherwise);

/* pages.c: frames of physical memory, by the address at which the kernel sees them */
void pages_init(void);
void *page_new(void);                           /* content unknown; never fails: it ends the run */
void page_hold(word page);
void page_drop(word page);
word page_holders(word page);
word page_free(void *page);                     /* what the caller must store in its first word */
void clear(void *at, word bytes);               /* a multiple of 4 */
void page_copy(void *to, const void *from);
void copy(void *to, const void *from, word count);

/* space.c: address spaces */
struct space {
    word root;                                  /* what CR3 gets */
    u64 *table;                                 /* level 2 of user space */
    u8 *rights;                                 /* what a process may do with each of its pages: MAY_READ, MAY_WRITE */
};
#define MAY_READ 1
#define MAY_WRITE 2
void space_new(struct space *space);            /* without rights yet */
void space_program(struct space *space);        /* the program's text, data and stack */
void space_fork(struct space *child, struct space *parent);
void space_clear(struct space *space);
void space_free(struct space *space);
int space_fault(struct space *space, word address, word error);
word space_map(struct space *space, word address, word pages, word rights);
int space_protect(struct space *space, word address, word pages, word rights);
int space_unmap(struct space *space, word address, word pages);
int space_allows(struct space *space, const void *address, word count, word rights);
u64 *space_entry(struct space *space, word address);

/* process.c and schedule.c */
struct queue { struct process *first, *last; };
enum state { UNUSED, RUNNABLE, WAITING, DEAD };
struct process {
    enum state state;
    u32 id;
    struct process *parent, *next;              /* next: in a queue */
    struct space space;
    word stack_top, stack;                      /* its kernel stack, and where it stopped on it */
    word on_fault;                              /* user code to go on at after a fault, or 0 */
    word result;
    struct queue children_gone;
};
extern struct process processes[PROCESSES], *current;
void stacks_init(void);
void process_first(void);
word process_fork(struct frame *frame);
void process_exec(struct frame *frame, word program, word argument);
void process_exit(word result) __attribute__((noreturn));
word process_wait(void);
extern word user_code, user_data;               /* selectors for user mode; the paravirtual entry has others */

extern volatile int want_switch;
void schedule(void);                            /* with interrupts off */
void make_runnable(struct process *process);
void wait_on(struct queue *queue);              /* with interrupts off */
void wake(struct queue *queue);
void yield(void);
void switch_stack(word *keep, word next);

/* trap.c */
void trap(struct frame *frame);
void double_fault(void);
extern word kernel_fixup;                       /* where the kernel goes on after a fault that it expects */

/* syscall.c, pipe.c, timer.c, disk.c */
word system_call(struct frame *frame);
word pipe_new(void);
word pipe_read(word pipe, u8 *to, word count);
word pipe_write(word pipe, const u8 *from, word count);
void timer_init(void);
void timer_interrupt(void);
extern volatile word ticks;
void sleep(word count);
void disk_init(void);
void disk_interrupt(void);
word disk_transfer(word command, word sector, u8 *buffer);

/* nanobench.c, bad.c, outcome.c */
word nanobench(word which, word iterations, word empty);
word bad(word which);
void outcome_begin(void);
void outcome_end(void);
void outcome_report(u32 operations, u32 iterations, u32 checksum);
void outcome_print(void);
