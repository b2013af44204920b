/* pv.c: the kernel under a hypervisor: setting up, patching the sites, events and the timer. Called by pv.S. */
#include "kernel.h"
#include "pv.h"
#include "text.h"

const word *phys_to_machine;
int by_hypercall;

void pv_must(int result)
{
    if (result < 0) {
        print("minios: the hypervisor refused: %x\n", (u32)result);
        shut_down(5);
    }
}

/* --- patching: a site becomes a CALL or a JMP, or other bytes of the same length */
extern u8 pv_sti[], pv_pushf[], pv_popf[], pv_halt[], pv_in_byte[], pv_in_word[], pv_out_byte[], pv_out_word[], pv_iret[];
extern u8 pv_load_cr3[], pv_flush[], pv_invlpg[], pv_set_stack[], pv_entry_read[], pv_entry_write[], pv_entry_write_now[];
extern u8 pv_table_new[], pv_table_free[], pv_root_new[], pv_root_free[];
void pv_console(const char *text, word length);
struct disk_request;
void pv_disk_start(struct disk_request *request);
#ifdef __x86_64__
extern u8 pv_read_cr2[], pv_iret_by_hypercall[];
#endif
static u32 task_priority;

#define CALL 0xe8
#define JMP 0xe9
static const struct { u8 opcode, length; u8 bytes[7]; const void *target; } replacements[] = {
    [K_CLI] = {0, 7, {0xc6, 0x05, 0, 0, 0, 0, 1}, (u8 *)&shared_info + 1},     /* movb $1, mask */
    [K_STI] = {CALL, 5, {}, pv_sti},
    [K_PUSHF] = {CALL, 5, {}, pv_pushf},
    [K_POPF] = {CALL, 5, {}, pv_popf},
    [K_IRET] = {JMP, 5, {}, pv_iret},
    [K_HALT] = {CALL, 5, {}, pv_halt},
    [K_IN_BYTE] = {CALL, 5, {}, pv_in_byte},
    [K_IN_WORD] = {CALL, 5, {}, pv_in_word},
    [K_OUT_BYTE] = {CALL, 5, {}, pv_out_byte},
    [K_OUT_WORD] = {CALL, 5, {}, pv_out_word},
    [K_LOAD_CR3] = {CALL, 5, {}, pv_load_cr3},
    [K_FLUSH] = {CALL, 5, {}, pv_flush},
    [K_INVLPG] = {CALL, 5, {}, pv_invlpg},
#ifdef __x86_64__
    [K_READ_CR2] = {CALL, 5, {}, pv_read_cr2},
#else
    [K_READ_CR2] = {0, 5, {0xa1}, (u8 *)&shared_info + CR2_AT},                 /* mov cr2, %eax */
#endif
    [K_SET_STACK] = {CALL, 5, {}, pv_set_stack},
    [K_ENTRY_READ] = {CALL, 5, {}, pv_entry_read},
    [K_ENTRY_WRITE] = {CALL, 5, {}, pv_entry_write},
    [K_ENTRY_WRITE_NOW] = {CALL, 5, {}, pv_entry_write_now},
    [K_TABLE_NEW] = {CALL, 5, {}, pv_table_new},
    [K_TABLE_FREE] = {CALL, 5, {}, pv_table_free},
    [K_ROOT_NEW] = {CALL, 5, {}, pv_root_new},
    [K_ROOT_FREE] = {CALL, 5, {}, pv_root_free},
#ifdef __x86_64__
    [K_TPR] = {0, 6, {0x89, 0x05}, &task_priority},                             /* mov %eax, task_priority */
#else
    [K_TPR] = {0, 5, {0xa3}, &task_priority},
#endif
    [K_CONSOLE] = {CALL, 5, {}, pv_console},
    [K_DISK] = {CALL, 5, {}, pv_disk_start},
#ifndef __x86_64__
    [K_SYSENTER] = {0, 2, {0xcd, 0x80}, 0},                                     /* int $0x80 */
#endif
};

static void patch(u8 *at, u32 kind)
{
    word target = (word)replacements[kind].target;
#ifdef __x86_64__
    if (kind == K_IRET && by_hypercall)
        target = (word)pv_iret_by_hypercall;
    if (kind == K_SET_STACK)            /* two bytes are left: data-size prefix, NOP */
        at[5] = 0x66, at[6] = 0x90;
#else
    if (kind == K_IRET && by_hypercall)
        target = (word)hypercall_page + HYPERCALL_IRET * 32;
#endif
    if (replacements[kind].opcode) {
        at[0] = replacements[kind].opcode;
        *(u32 *)(at + 1) = target - (word)at - 5;
        return;
    }
    copy(at, replacements[kind].bytes, replacements[kind].length);
#ifdef __x86_64__
    *(u32 *)(at + 2) = target - (word)at - replacements[kind].length;     /* relative to RIP, behind opcode and ModRM byte */
#else
    if (target)                         /* an absolute address: behind MOV's opcode, or its opcode and ModRM byte */
        *(u32 *)(at + (kind == K_CLI ? 2 : 1)) = target;
#endif
}

static void patch_all(void)
{
    extern const struct site { u32 at; u8 room, kind; u16 zero; } sites[], sites_end[];
    extern u8 user_load[], timer_init_native[] asm("timer_init");
    void pv_timer_init(void);
    for (const struct site *site = sites; site < sites_end; site++)     /* a program's is patched where it was loaded */
        patch((u8 *)(site->at < USER ? (word)site->at : site->at - USER + (word)user_load), site->kind);
    timer_init_native[0] = JMP;         /* this kernel has another timer altogether */
    *(u32 *)(timer_init_native + 1) = (word)pv_timer_init - (word)timer_init_native - 5;
}

/* --- setting up: what native_setup does in tables.c */
struct trap_info { u8 vector, flags; u16 selector; word address; };
static struct trap_info traps[64];
static u32 timer_port, disk_port;

static u32 bind(word command, u32 source)
{
    u32 words[3] = {source, 0, 0};      /* struct evtchn_bind_virq and _pirq have the port in the same place */
    pv_must(hypercall(HYPERCALL_EVENT_CHANNEL_OP, command, (word)words, 0, 0, 0));
    return words[2];
}

void pv_setup(const struct start_info *start)
{
    extern const struct trap_info trap_table[];
    extern u8 pv_upcall[], pv_failsafe[];
    word shared = start->shared_info;
#ifdef __x86_64__
    word system_calls = 0;
#endif
    phys_to_machine = (const word *)start->mfn_list;
    memory_end = start->pages * PAGE;
    memory_start = start->pt_base + (start->pt_frames + 1) * PAGE;      /* behind the tables, the first stack */
    command_line = start->command_line;
    user_code = PROGRAM_CS;
    user_data = PROGRAM_DS;
    pv_must(hypercall(HYPERCALL_UPDATE_VA_MAPPING, (word)&shared_info, WIDE(shared | 3) UVMF_INVLPG, 0 AND_ONE_MORE));
    by_hypercall = !!(start->flags & SIF_SERVICES);
    patch_all();
    pv_pages_init(start);
    struct trap_info *trap = traps;
    for (const struct trap_info *row = trap_table; row->address; row++)
        if (row->vector < 32 || row->vector == 0x80) {                  /* interrupts come as events */
            *trap = *row;
#ifdef __x86_64__
            trap->address -= FRAME_POPS;
            if (row->vector == 0x80)
                system_calls = trap->address;
#endif
            trap++->selector = KERNEL_CS;
        }
    pv_must(hypercall(HYPERCALL_SET_TRAP_TABLE, (word)traps, 0, 0, 0, 0));
#ifdef __x86_64__
    pv_must(hypercall(HYPERCALL_SET_CALLBACKS, (word)pv_upcall, (word)pv_failsafe, system_calls, 0, 0));    /* SYSCALL is INT 0x80 */
#else
    pv_must(hypercall(HYPERCALL_SET_CALLBACKS, KERNEL_CS, (word)pv_upcall, KERNEL_CS, (word)pv_failsafe, 0));
#endif
    timer_port = bind(EVTCHNOP_BIND_VIRQ, VIRQ_TIMER);
    disk_port = bind(EVTCHNOP_BIND_PIRQ, 11);
}

void pv_console(const char *text, word length) { pv_must(hypercall(HYPERCALL_CONSOLE_IO, 0, length, (word)text, 0, 0)); }

/* --- time: the clock that the hypervisor describes (struct vcpu_time_info), and the timer */
static u64 next_tick;
static u32 period;

u64 pv_system_time(void)
{
    u32 version, low, high, shift;
    u64 since, base;
    do {
        version = shared_info.time.version;
        asm volatile("rdtsc" : "=a"(low), "=d"(high));
        since = (((u64)high << 32 | low) - shared_info.time.tsc) << shared_info.time.shift;
        base = shared_info.time.system;
    } while ((version & 1) || version != shared_info.time.version);
    shift = shared_info.time.factor;    /* 32 fraction bits */
    return base + (since >> 32) * shift + ((since & 0xffffffff) * shift >> 32);
}

static void arm(void) { pv_must(hypercall(HYPERCALL_SET_TIMER_OP, WIDE(next_tick) 0, 0, 0 AND_ONE_MORE)); }

/* The same period as the 8254's natively (timer.c). */
void pv_timer_init(void)
{
    period = option_number("timer=", 0) / 838;
    if (!period)
        return;
    period = (period < 2 ? 2 : period > 65535 ? 65535 : period) * 838;
    next_tick = pv_system_time() + period;
    arm();
    for (word i = option_number("phase=", 0) / 2; i; i--)
        asm volatile("");
}

static void tick(void)
{
    u64 now = pv_system_time();
    timer_interrupt();
    do                                  /* ticks that were missed are one tick, as the 8259's are */
        next_tick += period;
    while (next_tick <= now);
    arm();
}

/* --- events: which ports are pending, until none is. Called by pv.S with events held off. */
void pv_events(struct frame *frame)
{
    while (shared_info.pending) {
        word selector = 0;
        shared_info.pending = 0;        /* before looking, so that none is missed */
        asm volatile("xchg %0, %1" : "+r"(selector), "+m"(shared_info.selector) :: "memory");
        for (u32 group = 0; group < 8 * sizeof(word); group++) {
            word events = 0;
            if (!(selector >> group & 1))
                continue;
            asm volatile("xchg %0, %1" : "+r"(events), "+m"(shared_info.events[group]) :: "memory");
            for (u32 port = 8 * sizeof(word) * group; events; events >>= 1, port++) {
                if (!(events & 1))
                    continue;
                counts.interrupts++;
                if (port == timer_port)
                    tick();
                else if (port == disk_port)
                    disk_interrupt();
                else
                    pv_disk_event(port);
            }
        }
    }
    if (want_switch && from_user(frame))
        yield();
}
