/* tables.c: descriptor tables, fast system calls and the interrupt controller, natively. Called once by start*.S. */
#include "kernel.h"

struct trap_row { u8 vector, flags; u16 selector; word address; };
struct table_pointer { u16 limit; word base; } __attribute__((packed));
extern const struct trap_row trap_table[];

#ifdef __x86_64__
static u64 gdt[] = {            /* null, code, data, 32-bit code (unused), user data, user code, task (two) */
    0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0x00cff3000000ffff, 0x00affb000000ffff, 0, 0,
};
static struct { u32 zero; word stack[3], zero2, ist[7]; u32 zero3, zero4; u16 zero5, io; } __attribute__((packed)) task;
asm(".globl task_stack\ntask_stack = task + 4");
static struct { u16 low, selector; u8 ist, type; u16 middle; u32 high, zero; } idt[256];
#else
static u64 gdt[] = {            /* null, code, data, user code, user data, task, double-fault task */
    0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff, 0, 0,
};
struct task { u32 link, stack, ss, zero[4], cr3, ip, flags, regs[4], sp, bp, si, di, es, cs, ss0, ds, fs, gs, ldt; u16 trap, io; };
static struct task task, double_fault_task;
asm(".globl task_stack\ntask_stack = task + 4");
static struct { u16 low, selector; u8 zero, type; u16 high; } idt[256];
#endif
static u8 double_fault_stack[1024] __attribute__((aligned(16)));
struct table_pointer gdt_pointer = {sizeof gdt - 1, (word)gdt};
static struct table_pointer idt_pointer = {sizeof idt - 1, (word)idt};

static void set_task(int index, const void *at, word size)
{
    word base = (word)at;
    gdt[index] = (size - 1) | (u64)(base & 0xffffff) << 16 | (u64)0x89 << 40 | (u64)(base >> 24) << 56;
}

static void set_gate(const struct trap_row *row)
{
    word address = row->address;
    idt[row->vector].low = address;
    idt[row->vector].selector = KERNEL_CODE;
    idt[row->vector].type = 0x80 | (row->flags & 3) << 5 | (row->flags & 4 ? 0xe : 0xf);
#ifdef __x86_64__
    idt[row->vector].middle = address >> 16;
    idt[row->vector].ist = row->vector == 8;    /* a stack of its own: the kernel's may be what is at fault */
#else
    idt[row->vector].high = address >> 16;
#endif
}

static void write_msr(u32 number, u32 low, u32 high) { asm volatile("wrmsr" :: "c"(number), "a"(low), "d"(high)); }

/* SDM Vol. 3A sections 5.8.7 and 5.8.8. */
static void fast_system_calls(void)
{
#ifdef __x86_64__
    extern u8 syscall_entry[];
    write_msr(0xc0000081, 0, 0x18 << 16 | KERNEL_CODE);     /* STAR: SYSRET takes data from 0x18 + 8, code from + 16 */
    write_msr(0xc0000082, (u32)(word)syscall_entry, 0);     /* LSTAR */
    write_msr(0xc0000084, 0x700, 0);                        /* SFMASK: IF, DF, TF */
#else
    extern u8 sysenter_entry[], task_stack[];
    write_msr(0x174, KERNEL_CODE, 0);
    write_msr(0x175, (word)task_stack, 0);
    write_msr(0x176, (word)sysenter_entry, 0);
#endif
}

/* The pair of 8259s to vectors 0x20..0x2f: ICW1..ICW4 of each, then the masks: timer, cascade and IRQ 11 pass. */
static void interrupt_controller(void)
{
    static const u8 script[] = {
        0x20, 0x11, 0x21, 0x20, 0x21, 0x04, 0x21, 0x01, 0xa0, 0x11, 0xa1, 0x28, 0xa1, 0x02, 0xa1, 0x01, 0x21, 0xfa, 0xa1, 0xf7,
    };
    for (word i = 0; i < sizeof script; i += 2)
        out_byte(script[i], script[i + 1]);
}

void native_setup(void)
{
    for (const struct trap_row *row = trap_table; row->address; row++)
        set_gate(row);
    set_task(TASK / 8, &task, sizeof task);
    task.io = sizeof task;      /* no I/O bitmap */
#ifdef __x86_64__
    task.ist[0] = (word)(double_fault_stack + sizeof double_fault_stack);
#else
    task.ss = KERNEL_DATA;
    double_fault_task = (struct task){
        .cr3 = (word)boot_root, .ip = (word)double_fault, .flags = 2, .sp = (word)(double_fault_stack + sizeof double_fault_stack),
        .cs = KERNEL_CODE, .ss0 = KERNEL_DATA, .ds = USER_DATA, .es = USER_DATA, .io = sizeof task,
    };
    set_task(TASK_DOUBLE_FAULT / 8, &double_fault_task, sizeof double_fault_task);
    idt[8].selector = TASK_DOUBLE_FAULT;
    idt[8].type = 0x85;         /* a task gate: a stack of its own */
#endif
    asm volatile("lidt %0" :: "m"(idt_pointer));
    asm volatile("ltr %%ax" :: "a"(TASK));
    fast_system_calls();
    interrupt_controller();
}

/* bad=no-idt (bad.c): a kernel without interrupt descriptors. */
void forget_idt(void)
{
    static const struct table_pointer none = {0, 0};
    asm volatile("lidt %0" :: "m"(none));
}
