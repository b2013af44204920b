/* What the files here share: memory that fast.py and fast_events.py allocate, fill and make grow.
 *
 * The C code looks up and adds; it allocates nothing, keeps nothing of its own, and needs neither Python's nor Unicorn's
 * headers. The order of the fields is repeated in Python, which checks it by counting before first use.
 */
#ifndef VMLAB_MACHINE_H
#define VMLAB_MACHINE_H

#include <stdint.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#ifdef _MSC_VER
#define NEVER_INLINE __declspec(noinline)
#else
#define NEVER_INLINE __attribute__((noinline))
#endif

#define REP (1ull << 32)  /* the block's last instruction is a string instruction under REP */
#define RING (1ull << 33) /* the block's last instruction may have changed CPL */
#define IRET (1ull << 34) /* the block's last instruction is IRET */

/* One block. The three counts are indexed by "is CPL 3". */
typedef struct {
    uint64_t runs[2], taken[2], again[2];
    uint64_t end;
    uint64_t traits; /* guest instructions in the low half; REP, RING and IRET */
} record;

/* One place of the hash table. what: size in the low half, the record's number in the high one; 0: free. */
typedef struct {
    uint64_t pc, what;
} place;

typedef struct {
    uint64_t time, limit;    /* guest instructions */
    uint64_t user;           /* 1 at CPL user_from and above */
    uint64_t attention;      /* ask Python at the next block; WHEN_ENABLED: if EFLAGS.IF is on then */
    uint64_t current;        /* number of the block that runs; 0: none */
    uint64_t places, mask;   /* the hash table: address, number of places - 1 */
    uint64_t records;        /* address; number 0 stays unused */
    uint64_t hflags;         /* address of the CPU's own flags, CPL in bits 0-1; 0: ask Python */
    uint64_t attend;         /* int (*)(uint64_t pc, uint32_t size): may the block run, and is it known now? */
    uint64_t read_cpl;       /* int (*)(void) */
    uint64_t cpl;            /* as of the block that runs */
    uint64_t irets[2];       /* IRETs that retired, indexed by "changed CPL" */
    uint64_t user_from;      /* 3, or 4 while ring 3 is a guest kernel's */
    uint64_t cuts;           /* address of an array by record number: addresses of `cuts`, 0 where a block has none */
    /* Events, see events.c. Where env is 0 the CPU's state is not to be seen, and none of them is connected. */
    uint64_t env;            /* address of QEMU's CPUX86State */
    uint64_t error_code, is_int, old_exception; /* offsets in it */
    uint64_t stopped;        /* the run ends: ask Python; FAILED: with an error */
    uint64_t on_exception;   /* void (*)(void *uc, uint32_t vector, void *data): all of it in Python */
    uint64_t on_trap;        /* void (*)(void): the block is left, who takes it? What it is: the next two words */
    uint64_t what, token;    /* a call without arguments costs Python half as much */
    uint64_t gates;          /* uint8_t[256]: the least privileged ring from which INT n goes to the monitor; NO_GATE: ask Python */
    uint64_t on_instruction; /* void (*)(void *uc, uint64_t address, uint32_t size, void *data): all of it in Python */
    uint64_t on_gate;        /* void (*)(void): the block is left, RIP is at the gate, and its address in `what` */
    uint64_t write_register; /* uc_reg_write */
    uint64_t left, left_at;  /* number of the block that was left last, and at which offset */
    uint64_t virtual_cpu;    /* address of a `virtual_cpu`; 0: no shortcuts */
    uint64_t door;           /* linear address of a translator's gate; 0: none */
    uint64_t sites, site_count; /* address and length of an array of `site` */
    uint64_t svm;            /* address of an `svm`; 0: nobody enters guest mode */
    uint64_t faults;         /* address of a `faults`; 0: no shadow whose hidden faults are C's */
    uint64_t on_port;        /* void (*)(void): the access in `what`, the value in `token`, either way */
    uint64_t time_stamp;     /* how far the time stamp counter is ahead of time */
} state;

#define FAILED 1
#define WHEN_ENABLED 2
#define NO_GATE 0xFF
#define NONE 0xFFFFFFFFu

/* What leaving a block at one byte offset of it means. */
typedef struct {
    uint32_t index;      /* of the instruction that begins here; NONE: none does */
    uint32_t weight;     /* guest instructions from here to the end */
    uint32_t next, before; /* offsets of the next instruction and of the one before; NONE: none */
    uint32_t slow;       /* Python has more to do when this instruction is left */
    uint32_t shortcut;   /* what its trap is to a monitor: CLI or STI; 0: ask the monitor */
    uint64_t n[2];       /* how often the block was left here, by "is CPL 3" */
    uint64_t hits;       /* how often the shortcut was taken */
    uint64_t token;      /* names the decoded instruction */
} cut;

/* `at` has size + 1 entries. */
typedef struct {
    uint64_t pc, size;
    cut at[1];
} cuts;

#define CLI 1
#define STI 2

/* Virtual privileged state of a deprivileged guest: vmlab/vmm/vcpu.py and vmlab/vmm/platform.py. */
typedef struct {
    uint64_t flags;      /* address of a uint32_t with the virtual IF and IOPL */
    uint64_t shadow_at;  /* RIP in the shadow of STI; all ones: none */
    uint64_t pending;    /* INTR of the virtual CPU */
    uint64_t noted;      /* address of a uint32_t where a translator notes the same; 0: none */
    uint64_t site;       /* address of a uint32_t: the callout under way */
} virtual_cpu;

/* A callout that is known to do nothing but this: vmlab/strategies/translation.py. */
typedef struct {
    uint64_t what;       /* CLI, STI; 0: ask the monitor */
    uint64_t after;      /* where the cache goes on */
    uint64_t rip, size;  /* the guest's instruction */
    uint64_t hits;
} site;

/* Guest mode, see svm.c. */
typedef struct {
    uint64_t plain;          /* the CPU is in the guest, no event is under way and none waits: an exit is no more than the switch */
    uint64_t ram;            /* address of machine memory */
    uint64_t vmcb, host;     /* hpa */
    uint64_t debug_registers; /* offset in CPUX86State */
    uint64_t read_register;  /* uc_reg_read */
    uint64_t on_exit;        /* void (*)(void): the host is back, the VMCB says why */
    uint64_t code;           /* the exit code */
    uint64_t again;          /* the VMM handled it, and enters the guest again */
    uint64_t waits;          /* what is to happen in the guest, a kick for one, has to be prepared in Python */
    uint64_t nested_root;    /* hpa of the nested tables at the last entry; 0: none */
    uint64_t vmrun;          /* RIP of the host's VMRUN */
    uint64_t on_entry;       /* void (*)(void): Python prepares this one */
    uint64_t ram_size;       /* bytes */
} svm;

/* One IN or OUT, see ports.c. */
typedef struct {
    uint64_t state;          /* address of the machine's */
    uint64_t port;           /* IN_DX: in DX */
    uint64_t size, size_in_16_bits; /* bytes, in code of 32 or 64 bits and in code of 16 */
    uint64_t reads;          /* IN */
    uint64_t length;         /* of the instruction */
    uint64_t information;    /* of an exit: what does not depend on the CPU's state */
} port_site;

void vmlab_plain_exit(void *uc, state *s, svm *v, uint64_t code, uint64_t information);

/* Hidden page faults, see faults.c. */
#define WINDOWS 256
typedef struct {
    uint64_t used, first;    /* linear address */
    uint64_t size;           /* of a guest's entry: 4 or 8 */
    uint64_t uppers, upper_at[2], upper[2]; /* the guest's upper entries: where, and what they were */
    uint64_t table;          /* address of the guest entry of the first page */
    uint64_t access;         /* the rights that the upper entries give, RW and US; and G where the CPU has global pages on */
    uint64_t leaves;         /* address of the shadow page */
} window;

typedef struct {
    uint64_t memory_base, memory_size; /* the guest's memory: hpa, bytes */
    uint64_t hidden, dirty;  /* faults carried out here */
    window windows[WINDOWS];
} faults;

int vmlab_hidden_fault(const state *s, uint32_t error_code);

#endif

#define AT(type, address) ((type)(uintptr_t)(address))

