/* IN, OUT and RDTSC: Instructions._port() and ._rdtsc() of vmlab/machine/instructions.py, as Unicorn's callback at the exact address of one.
 *
 * C sees to the rights that Unicorn never checks and to AMD-V's intercept, leaves the block and moves RIP on; the device is Python's.
 * Where IOPL does not allow the access, an I/O permission bitmap decides, and Python does all of it, as of whatever else is not plain.
 */
#include "machine.h"

/* QEMU target/i386/cpu.h: offsets in CPUX86State and bits of hflags */
#define RAX_AT 0
#define RDX_AT 16
#define EIP 128
#define EFLAGS 136
#define HFLAGS 176
#define CS_BASE (184 + 24 + 8)
#define CR0_AT 424
#define CR4_AT (CR0_AT + 32)
#define HF_SHADOW (1u << 3)
#define HF_CODE_SIZE (1u << 4 | 1u << 15) /* CS32, CS64 */
#define HF_GUEST (1u << 21)
#define CR0_PE 1u
#define CR4_TSD (1u << 2)
#define RDTSC_SIZE 2
#define IOPL_SHIFT 12
#define VM (1u << 17)
#define UC_X86_REG_RIP 41

/* The VMCB: APM Vol. 2 appendix B; the exit and its information: §15.10.2 */
#define INTERCEPTS 0x00C
#define IOPM_BASE 0x040
#define EXIT_INFO_2 0x080
#define EXIT_IOIO 0x7B
#define INTERCEPT_IOIO (1ull << 0x1B)
#define IO_IN 1u
#define IO_SIZE_SHIFT 4
#define IO_PORT_SHIFT 16
#define IOPM_SIZE 0x3000

#define FIELD(type, s, offset) (*AT(type *, (s)->env + (offset)))

#define IN_DX 0x10000

/* What the access is told to Python as */
#define SIZE_SHIFT 16
#define READ (1ull << 24)

/* The I/O permission map has a bit for each port (APM Vol. 2 §15.10.1). 0: this access does not exit, or Python knows. */
static int intercepted(const svm *v, uint32_t port, uint32_t size)
{
    uint64_t vmcb = v->ram + v->vmcb, map = *AT(const uint64_t *, vmcb + IOPM_BASE);
    const uint8_t *bits;

    if (!(*AT(const uint64_t *, vmcb + INTERCEPTS) & INTERCEPT_IOIO) || map > v->ram_size - IOPM_SIZE)
        return 0;
    bits = AT(const uint8_t *, v->ram + map + port / 8);
    return (bits[0] | bits[1] << 8) >> port % 8 & ((1u << size) - 1);
}

/* The instruction at this offset of the running block retired, and control is taken from the block: Counter.leave(). */
static void leave_behind(state *s, cuts *table, const cut *here)
{
    cut *next = &table->at[here->next];

    s->left = s->current;
    if (here->next < table->size && next->index != NONE) {
        next->n[s->user]++;
        s->time -= next->weight;
    }
    s->current = 0;
}

static void set_cpl(state *s)
{
    s->cpl = FIELD(uint32_t, s, HFLAGS) & 3;
    s->user = s->cpl >= s->user_from;
}

/* uc_cb_hookcode_t; data: the instruction's `port_site` */
EXPORT void vmlab_port(void *uc, uint64_t address, uint32_t length, void *data)
{
    const port_site *site = data;
    state *s = AT(state *, site->state);
    svm *v = AT(svm *, s->svm);
    uint32_t hflags = FIELD(uint32_t, s, HFLAGS), port, size, cpl = hflags & 3;
    cuts *table = s->current ? AT(cuts *, AT(const uint64_t *, s->cuts)[s->current]) : 0;
    uint64_t rip = address - FIELD(uint64_t, s, CS_BASE);
    cut *here;

    if (s->stopped || !table || address - table->pc >= table->size)
        goto python;
    here = &table->at[address - table->pc];
    if (here->index == NONE || here->slow)
        goto python;
    if (FIELD(uint64_t, s, EFLAGS) & VM || (FIELD(uint64_t, s, CR0_AT) & CR0_PE && cpl > (FIELD(uint64_t, s, EFLAGS) >> IOPL_SHIFT & 3)))
        goto python;
    port = site->port == IN_DX ? FIELD(uint32_t, s, RDX_AT) & 0xFFFF : (uint32_t)site->port;
    size = (uint32_t)(hflags & HF_CODE_SIZE ? site->size : site->size_in_16_bits);
    if (hflags & HF_GUEST) {
        if (!v || !v->plain || !intercepted(v, port, size))
            goto python;
        FIELD(uint64_t, s, EIP) = rip;
        *AT(uint64_t *, v->ram + v->vmcb + EXIT_INFO_2) = rip + site->length;
        s->token = here->token;
        here->n[s->user]++;
        s->time -= here->weight;
        s->left = s->current;
        s->current = 0;
        vmlab_plain_exit(uc, s, v, EXIT_IOIO, site->information | port << IO_PORT_SHIFT | size << IO_SIZE_SHIFT | (site->reads ? IO_IN : 0));
        set_cpl(s);
    } else {
        uint64_t mask = (1ull << 8 * size) - 1, *rax = &FIELD(uint64_t, s, RAX_AT);

        FIELD(uint64_t, s, EIP) = rip;
        leave_behind(s, table, here);   /* first, so that the device sees the time */
        s->what = port | (uint64_t)size << SIZE_SHIFT | (site->reads ? READ : 0);
        s->token = *rax & mask;
        AT(void (*)(void), s->on_port)();
        if (s->stopped & FAILED)
            return;
        if (site->reads)
            *rax = (size == 4 ? 0 : *rax & ~mask) | (s->token & mask);
        FIELD(uint64_t, s, EIP) = rip + site->length;
        FIELD(uint32_t, s, HFLAGS) &= ~HF_SHADOW;
        set_cpl(s);
    }
    AT(int (*)(void *, int, const void *), s->write_register)(uc, UC_X86_REG_RIP, &FIELD(uint64_t, s, EIP));
    return;
python:
    AT(void (*)(void *, uint64_t, uint32_t, void *), s->on_instruction)(uc, address, length, data);
}

/* Whether RDTSC is more than a look at the clock: in guest mode the counter has an offset, and may be intercepted. */
static int time_is_pythons(const state *s)
{
    uint32_t hflags = FIELD(uint32_t, s, HFLAGS);

    return s->stopped || hflags & HF_GUEST || (hflags & 3 && FIELD(uint64_t, s, CR4_AT) & CR4_TSD);
}

static void tell_time(void *uc, state *s, uint64_t address, uint64_t stamp)
{
    FIELD(uint64_t, s, RAX_AT) = stamp & 0xFFFFFFFF;
    FIELD(uint64_t, s, RDX_AT) = stamp >> 32;
    FIELD(uint64_t, s, EIP) = address - FIELD(uint64_t, s, CS_BASE) + RDTSC_SIZE;
    FIELD(uint32_t, s, HFLAGS) &= ~HF_SHADOW;
    set_cpl(s);
    AT(int (*)(void *, int, const void *), s->write_register)(uc, UC_X86_REG_RIP, &FIELD(uint64_t, s, EIP));
}

/* uc_cb_hookcode_t at an RDTSC without prefixes; a tick is a nanosecond (running.py). */
EXPORT void vmlab_time_stamp(void *uc, uint64_t address, uint32_t length, void *data)
{
    state *s = data;
    cuts *table = s->current ? AT(cuts *, AT(const uint64_t *, s->cuts)[s->current]) : 0;
    cut *here = table && address - table->pc < table->size ? &table->at[address - table->pc] : 0;
    uint64_t stamp;

    if (!here || here->index == NONE || here->slow || time_is_pythons(s)) {
        AT(void (*)(void *, uint64_t, uint32_t, void *), s->on_instruction)(uc, address, length, data);
        return;
    }
    stamp = s->time - here->weight + s->time_stamp;
    leave_behind(s, table, here);
    tell_time(uc, s, address, stamp);
}

/* The same where nothing is counted (uncounted.py). */
EXPORT void vmlab_guessed_time_stamp(void *uc, uint64_t address, uint32_t length, void *data)
{
    state *s = data;

    if (time_is_pythons(s))
        AT(void (*)(void *, uint64_t, uint32_t, void *), s->on_instruction)(uc, address, length, data);
    else
        tell_time(uc, s, address, s->time + s->time_stamp);
}
