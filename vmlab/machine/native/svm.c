/* #VMEXIT: vmlab/machine/svm_switch.py (APM Vol. 2 §15.6), and the way back to VMRUN: Svm._prepare().
 *
 * The CPU's guest state goes to the VMCB, the host's comes back from the host save area. Unicorn does what follows from the control
 * registers (mode bits, its TLB); everything else is in the CPU's state.
 */
#include "machine.h"

/* QEMU target/i386/cpu.h, as vmlab/machine/state.py and cpu.py have them: offsets in CPUX86State. */
#define GPR(n) (8 * (n))
#define EIP 128
#define EFLAGS 136
#define CC_SRC 152
#define CC_OP 168
#define DF_AT 172
#define HFLAGS 176
#define HFLAGS2 180
#define SEGMENT(n) (184 + 24 * (n))
#define GDT 376
#define IDT 400
#define CR(n) (424 + 8 * (n))
#define EFER 592
#define RAX 0
#define RSP 4
#define CC_OP_EFLAGS 1

#define HF_CPL 3u
#define HF_SHADOW (1u << 3)
#define HF_CS32 (1u << 4)
#define HF_SS32 (1u << 5)
#define HF_ADDSEG (1u << 6)
#define HF_PE (1u << 7)
#define HF_LMA (1u << 14)
#define HF_CS64 (1u << 15)
#define HF_GUEST (1u << 21)
#define HF2_OF_GUESTS (1u << 0 | 1u << 1 | 1u << 3 | 1u << 6) /* GIF, HIF, VINTR, NPT */
#define EFER_LMA (1u << 10)
#define ARITHMETIC 0x8D5u
#define DF 0x400u
#define VM (1u << 17)

/* The VMCB: APM Vol. 2 appendix B. */
#define INTERCEPTS 0x00C
#define TSC_OFFSET 0x050
#define ASID 0x058
#define INTERRUPT_CONTROL 0x060
#define INTERRUPT_SHADOW 0x068
#define EXIT_CODE 0x070
#define EXIT_INFO_1 0x078
#define EXIT_INTERRUPT_INFO 0x088
#define NESTED_CONTROL 0x090
#define EVENT_INJECTION 0x0A8
#define NESTED_CR3 0x0B0
#define SAVED_SEGMENT(n) (0x400 + 16 * (n))
#define SAVED_GDTR 0x460
#define SAVED_IDTR 0x480
#define SAVED_CPL 0x4CB
#define SAVED_EFER 0x4D0
#define SAVED_CR4 0x548
#define SAVED_CR3 0x550
#define SAVED_CR0 0x558
#define SAVED_DR7 0x560
#define SAVED_DR6 0x568
#define SAVED_RFLAGS 0x570
#define SAVED_RIP 0x578
#define SAVED_RSP 0x5D8
#define SAVED_RAX 0x5F8
#define SAVED_CR2 0x640
#define V_IRQ (1u << 8)
#define INTERCEPT_VMRUN (1ull << 32)
#define EFER_LME (1u << 8)
#define EFER_SVME (1u << 12)
#define CR0_PE (1u << 0)
#define CR0_NW (1u << 29)
#define CR0_CD (1u << 30)
#define CR0_PG (1u << 31)
#define CR4_PAE (1u << 5)
#define CR4_FLUSHING (1u << 4 | 1u << 5 | 1u << 7 | 1u << 20) /* PSE, PAE, PGE, SMEP: QEMU cpu_x86_update_cr4 */
#define CR0_FLUSHING (CR0_PG | 1u << 16 | CR0_PE)             /* WP: cpu_x86_update_cr0 */

/* unicorn/x86.h */
#define UC_X86_REG_EFLAGS 25
#define UC_X86_REG_CR0 50
#define UC_X86_REG_CR3 53
#define UC_X86_REG_CR4 54

#define FIELD(type, s, offset) (*AT(type *, (s)->env + (offset)))
#define IN_VMCB(type, block, offset) (*AT(type *, (block) + (offset)))

enum { ES, CS, SS, DS };

static uint64_t flags_of(void *uc, const state *s, const svm *v)
{
    uint64_t system = FIELD(uint64_t, s, EFLAGS) & ~(uint64_t)(ARITHMETIC | DF), all = 0;

    if (FIELD(uint32_t, s, CC_OP) == CC_OP_EFLAGS)
        return system | (FIELD(uint64_t, s, CC_SRC) & ARITHMETIC) | (FIELD(uint32_t, s, DF_AT) & DF);
    AT(int (*)(void *, int, void *), v->read_register)(uc, UC_X86_REG_EFLAGS, &all);
    return system | (all & (ARITHMETIC | DF));
}

static void save_segment(const state *s, uint64_t vmcb, int n)
{
    uint64_t at = SEGMENT(n), to = SAVED_SEGMENT(n);
    uint32_t flags = FIELD(uint32_t, s, at + 20);

    IN_VMCB(uint16_t, vmcb, to) = (uint16_t)FIELD(uint32_t, s, at);
    IN_VMCB(uint16_t, vmcb, to + 2) = (flags >> 8 & 0xFF) | (flags >> 12 & 0xF00);
    IN_VMCB(uint32_t, vmcb, to + 4) = FIELD(uint32_t, s, at + 16);
    IN_VMCB(uint64_t, vmcb, to + 8) = FIELD(uint64_t, s, at + 8);
}

/* Cpu.set_segment() of vmlab/machine/cpu.py */
static void load_segment(const state *s, uint64_t block, int n)
{
    uint64_t at = SEGMENT(n), from = SAVED_SEGMENT(n);
    uint32_t attributes = IN_VMCB(uint16_t, block, from + 2), hflags = FIELD(uint32_t, s, HFLAGS);
    uint32_t flags = (attributes & 0xFF) << 8 | (attributes & 0xF00) << 12;

    FIELD(uint32_t, s, at) = IN_VMCB(uint16_t, block, from);
    FIELD(uint64_t, s, at + 8) = IN_VMCB(uint64_t, block, from + 8);
    FIELD(uint32_t, s, at + 16) = IN_VMCB(uint32_t, block, from + 4);
    FIELD(uint32_t, s, at + 20) = flags;
    if (n == CS) {
        hflags &= ~(HF_CS32 | HF_CS64);
        hflags |= hflags & HF_LMA && flags & 1u << 21 ? HF_CS64 | HF_CS32 : flags & 1u << 22 ? HF_CS32 : 0;
    } else if (n == SS) {
        hflags = (hflags & ~(HF_SS32 | HF_CPL)) | (flags & 1u << 22 ? HF_SS32 : 0);
        hflags |= hflags & HF_PE ? flags >> 13 & 3 : 0;
    }
    hflags &= ~HF_ADDSEG;
    if (hflags & HF_CS64) {
        hflags |= HF_SS32;
    } else {
        int flat = hflags & HF_PE && hflags & HF_CS32 && !(FIELD(uint64_t, s, EFLAGS) & VM)
                   && !(FIELD(uint64_t, s, SEGMENT(DS) + 8) | FIELD(uint64_t, s, SEGMENT(ES) + 8) | FIELD(uint64_t, s, SEGMENT(SS) + 8));
        hflags |= flat ? 0 : HF_ADDSEG;
    }
    FIELD(uint32_t, s, HFLAGS) = hflags;
}

static void load_table(const state *s, uint64_t at, uint64_t block, uint64_t from)
{
    FIELD(uint32_t, s, at) = 0;
    FIELD(uint64_t, s, at + 8) = IN_VMCB(uint64_t, block, from + 8);
    FIELD(uint32_t, s, at + 16) = IN_VMCB(uint32_t, block, from + 4);
    FIELD(uint32_t, s, at + 20) = 0;
}

/* From the guest of the VMCB at hpa v->vmcb to the host of the area at v->host. Why, the caller writes into the VMCB. */
EXPORT void vmlab_world_switch(void *uc, state *s, const svm *v)
{
    int (*write_register)(void *, int, const void *) = AT(int (*)(void *, int, const void *), s->write_register);
    uint64_t vmcb = v->ram + v->vmcb, host = v->ram + v->host, flags;
    int n;

    for (n = ES; n <= DS; n++)
        save_segment(s, vmcb, n);
    IN_VMCB(uint64_t, vmcb, SAVED_GDTR + 8) = FIELD(uint64_t, s, GDT + 8);
    IN_VMCB(uint32_t, vmcb, SAVED_GDTR + 4) = FIELD(uint32_t, s, GDT + 16);
    IN_VMCB(uint64_t, vmcb, SAVED_IDTR + 8) = FIELD(uint64_t, s, IDT + 8);
    IN_VMCB(uint32_t, vmcb, SAVED_IDTR + 4) = FIELD(uint32_t, s, IDT + 16);
    IN_VMCB(uint64_t, vmcb, SAVED_CR4) = FIELD(uint64_t, s, CR(4));
    IN_VMCB(uint64_t, vmcb, SAVED_CR3) = FIELD(uint64_t, s, CR(3));
    IN_VMCB(uint64_t, vmcb, SAVED_CR0) = FIELD(uint64_t, s, CR(0));
    IN_VMCB(uint64_t, vmcb, SAVED_DR7) = FIELD(uint64_t, s, v->debug_registers + 8 * 7);
    IN_VMCB(uint64_t, vmcb, SAVED_DR6) = FIELD(uint64_t, s, v->debug_registers + 8 * 6);
    IN_VMCB(uint64_t, vmcb, SAVED_RFLAGS) = flags_of(uc, s, v);
    IN_VMCB(uint64_t, vmcb, SAVED_RIP) = FIELD(uint64_t, s, EIP);
    IN_VMCB(uint64_t, vmcb, SAVED_RSP) = FIELD(uint64_t, s, GPR(RSP));
    IN_VMCB(uint64_t, vmcb, SAVED_RAX) = FIELD(uint64_t, s, GPR(RAX));
    IN_VMCB(uint64_t, vmcb, SAVED_CR2) = FIELD(uint64_t, s, CR(2));
    IN_VMCB(uint64_t, vmcb, SAVED_EFER) = FIELD(uint64_t, s, EFER);
    IN_VMCB(uint8_t, vmcb, SAVED_CPL) = FIELD(uint32_t, s, HFLAGS) & HF_CPL;
    IN_VMCB(uint64_t, vmcb, INTERRUPT_SHADOW) = !!(FIELD(uint32_t, s, HFLAGS) & HF_SHADOW);

    FIELD(int32_t, s, s->old_exception) = -1;
    FIELD(uint32_t, s, s->is_int) = 0;
    FIELD(uint32_t, s, HFLAGS) &= ~(HF_GUEST | HF_SHADOW);
    FIELD(uint32_t, s, HFLAGS2) &= ~HF2_OF_GUESTS;
    FIELD(uint64_t, s, EFER) = IN_VMCB(uint64_t, host, SAVED_EFER);
    FIELD(uint32_t, s, HFLAGS) = (FIELD(uint32_t, s, HFLAGS) & ~HF_LMA) | (FIELD(uint64_t, s, EFER) & EFER_LMA ? HF_LMA : 0);
    /* QEMU flushes its TLB at a write of CR3, and of CR4 and CR0 where certain bits change: once is enough. */
    if ((FIELD(uint64_t, s, CR(4)) ^ IN_VMCB(uint64_t, host, SAVED_CR4)) & CR4_FLUSHING
        || (FIELD(uint64_t, s, CR(0)) ^ IN_VMCB(uint64_t, host, SAVED_CR0)) & CR0_FLUSHING)
        FIELD(uint64_t, s, CR(3)) = IN_VMCB(uint64_t, host, SAVED_CR3);
    else
        write_register(uc, UC_X86_REG_CR3, AT(const void *, host + SAVED_CR3));
    write_register(uc, UC_X86_REG_CR4, AT(const void *, host + SAVED_CR4));
    write_register(uc, UC_X86_REG_CR0, AT(const void *, host + SAVED_CR0));
    for (n = ES; n <= DS; n++)
        load_segment(s, host, n);
    load_table(s, GDT, host, SAVED_GDTR);
    load_table(s, IDT, host, SAVED_IDTR);
    FIELD(uint32_t, s, HFLAGS) &= ~HF_CPL;
    flags = IN_VMCB(uint64_t, host, SAVED_RFLAGS);
    FIELD(uint64_t, s, CC_SRC) = flags & ARITHMETIC;
    FIELD(uint32_t, s, CC_OP) = CC_OP_EFLAGS;
    FIELD(int32_t, s, DF_AT) = flags & DF ? -1 : 1;
    FIELD(uint64_t, s, EFLAGS) = (flags & ~(uint64_t)(ARITHMETIC | DF)) | 2;
    FIELD(uint64_t, s, v->debug_registers + 8 * 7) = 0x400;
    FIELD(uint64_t, s, GPR(RSP)) = IN_VMCB(uint64_t, host, SAVED_RSP);
    FIELD(uint64_t, s, GPR(RAX)) = IN_VMCB(uint64_t, host, SAVED_RAX);
    FIELD(uint64_t, s, EIP) = IN_VMCB(uint64_t, host, SAVED_RIP);
}

/* Svm._consistent(): the checks of VMRUN that QEMU leaves out (APM Vol. 2 §15.5.1). */
static int consistent(uint64_t vmcb)
{
    uint64_t efer = IN_VMCB(uint64_t, vmcb, SAVED_EFER), cr0 = IN_VMCB(uint64_t, vmcb, SAVED_CR0);
    int long_paging = efer & EFER_LME && cr0 & CR0_PG;

    return efer & EFER_SVME && IN_VMCB(uint32_t, vmcb, ASID) && IN_VMCB(uint64_t, vmcb, INTERCEPTS) & INTERCEPT_VMRUN
           && !(cr0 & CR0_NW && !(cr0 & CR0_CD)) && !(cr0 >> 32) && !(IN_VMCB(uint64_t, vmcb, SAVED_DR6) >> 32)
           && !(IN_VMCB(uint64_t, vmcb, SAVED_DR7) >> 32)
           && !(long_paging && (!(IN_VMCB(uint64_t, vmcb, SAVED_CR4) & CR4_PAE) || !(cr0 & CR0_PE)));
}

/* Svm._prepare() for an entry at which nothing is to be injected, nothing waits, and nothing changed that the machine keeps of the VMCB. */
static int enters_plainly(const svm *v, uint64_t vmcb)
{
    uint64_t root = IN_VMCB(uint64_t, vmcb, NESTED_CONTROL) & 1 ? IN_VMCB(uint64_t, vmcb, NESTED_CR3) : 0;

    return !v->waits && !IN_VMCB(uint64_t, vmcb, EVENT_INJECTION) && !(IN_VMCB(uint32_t, vmcb, INTERRUPT_CONTROL) & V_IRQ)
           && !IN_VMCB(uint64_t, vmcb, TSC_OFFSET) && root == v->nested_root && consistent(vmcb);
}

/* An exit with no event under way (v->plain): the switch, and why; then the VMM's turn, and perhaps the way back to VMRUN. */
void vmlab_plain_exit(void *uc, state *s, svm *v, uint64_t code, uint64_t information)
{
    uint64_t vmcb = v->ram + v->vmcb;

    vmlab_world_switch(uc, s, v);
    IN_VMCB(uint32_t, vmcb, INTERRUPT_CONTROL) &= ~V_IRQ;
    IN_VMCB(uint64_t, vmcb, EXIT_CODE) = code;
    IN_VMCB(uint64_t, vmcb, EXIT_INFO_1) = information;
    IN_VMCB(uint64_t, vmcb, EXIT_INTERRUPT_INFO) = 0;
    IN_VMCB(uint64_t, vmcb, EVENT_INJECTION) = 0;
    v->plain = v->again = 0;
    v->code = code;
    AT(void (*)(void), v->on_exit)();
    if (!v->again)
        return;
    vmcb = v->ram + v->vmcb;
    if (enters_plainly(v, vmcb)) {
        v->plain = 1;
        FIELD(uint64_t, s, GPR(RAX)) = v->vmcb;
        FIELD(uint64_t, s, EIP) = v->vmrun;
    } else {
        AT(void (*)(void), v->on_entry)();
    }
}
