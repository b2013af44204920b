/* The hottest events: Exceptions._on_exception() of vmlab/machine/exceptions.py and Blocks._on_instruction() of blocks.py, as
 * Unicorn's callbacks.
 *
 * C leaves the block (Counter.leave()) and asks Python what the event means. Where a monitor has said of one trapping instruction
 * that it does nothing but change the virtual interrupt flag, C does that too. Whatever is not plain is left to the same Python
 * methods that the portable path calls, untouched.
 */
#include "machine.h"

/* QEMU target/i386/cpu.h: offsets in CPUX86State and bits of hflags; vmlab/machine/state.py finds and checks them. */
#define EIP 128
#define EFLAGS 136
#define HFLAGS 176
#define CS_BASE (184 + 24 + 8)
#define DS_BASE (184 + 3 * 24 + 8)
#define HF_LMA (1u << 14)
#define HF_GUEST (1u << 21)
#define TF (1u << 8)
#define IF (1u << 9)
#define IOPL (3u << 12)

#define GENERAL_PROTECTION 13
#define PAGE_FAULT 14
#define VMEXIT 0x100 /* QEMU's EXCP_VMEXIT: above it, an exit code */
#define HAS_ERROR_CODE ((1u << 8) | (1u << 10) | (1u << 11) | (1u << 12) | (1u << 13) | (1u << 14) | (1u << 17))
#define UC_X86_REG_RIP 41

#define FIELD(type, s, offset) (*AT(type *, (s)->env + (offset)))

/* What `what` is at a trap: the vector, and with it */
#define SOFTWARE (1ull << 8)
#define WITH_ERROR_CODE (1ull << 9)
#define ERROR_CODE_SHIFT 32

/* Where the running block may be left at the linear address `at`; 0: Python knows. */
static cut *place_in_block(const state *s, uint64_t at)
{
    const uint64_t *all = AT(const uint64_t *, s->cuts);
    cuts *table = s->current ? AT(cuts *, all[s->current]) : 0;
    cut *found;

    if (!table || at - table->pc >= table->size)
        return 0;
    found = &table->at[at - table->pc];
    return found->index == NONE || found->slow ? 0 : found;
}

static void leave_at(state *s, cut *here)
{
    here->n[s->user]++;
    s->time -= here->weight;
    s->left = s->current;
    s->current = 0;
}

static void set_cpl(state *s)
{
    s->cpl = FIELD(uint32_t, s, HFLAGS) & 3;
    s->user = s->cpl >= s->user_from;
}

/* CLI or STI on the virtual CPU, as emulate.py has it; 0: there is more to it. Nothing was changed then. */
static int on_virtual_cpu(state *s, uint64_t what, uint64_t rip, uint64_t next)
{
    virtual_cpu *v = AT(virtual_cpu *, s->virtual_cpu);
    uint32_t *flags = AT(uint32_t *, v->flags), *noted = AT(uint32_t *, v->noted);

    if (s->attention || (what == STI && v->pending) || (noted && *noted != (v->pending != 0)))
        return 0;
    if (what == STI) {
        if (!(*flags & IF))
            v->shadow_at = next;
        *flags = (*flags & (IF | IOPL)) | IF;
    } else {
        *flags &= IOPL;
        if (v->shadow_at == rip)
            v->shadow_at = ~0ull;
    }
    s->time++;
    return 1;
}

/* INT n through a gate of the monitor's: the instruction retired, RIP is behind it. */
static int software_interrupt(state *s, uint32_t vector, uint64_t at)
{
    const uint8_t *gates = AT(const uint8_t *, s->gates);
    const uint64_t *all = AT(const uint64_t *, s->cuts);
    cuts *table = s->current ? AT(cuts *, all[s->current]) : 0;
    uint64_t offset;
    cut *here;

    if (vector > 255 || gates[vector] == NO_GATE || (FIELD(uint32_t, s, HFLAGS) & 3) > gates[vector])
        return 0;
    if (!table || (offset = at - table->pc) > table->size || table->at[offset].before == NONE)
        return 0;
    here = &table->at[offset];
    if (offset == table->size) {
        s->left = s->current;
        s->current = 0;
    } else if (here->index == NONE) {
        return 0;
    } else {
        leave_at(s, here);
    }
    return 1;
}

/* uc_cb_hookintr_t of unicorn.h */
EXPORT void vmlab_exception(void *uc, uint32_t vector, void *data)
{
    state *s = data;
    uint32_t hflags = FIELD(uint32_t, s, HFLAGS);
    uint64_t rip = FIELD(uint64_t, s, EIP), at = rip + FIELD(uint64_t, s, CS_BASE), what = vector, token = NONE;
    int software = FIELD(uint32_t, s, s->is_int) && vector != 1;
    cut *here = 0;

    if (s->stopped & FAILED)
        goto python;
    if (vector > 255 || hflags & HF_GUEST) {
        svm *v = AT(svm *, s->svm);

        here = vector >= VMEXIT && v && v->plain ? place_in_block(s, at) : 0;
        if (!here)
            goto python;
        s->token = here->token;
        leave_at(s, here);
        vmlab_plain_exit(uc, s, v, vector - VMEXIT, FIELD(uint32_t, s, s->error_code));
        set_cpl(s);
        return;
    }
    if (software) {
        if (!software_interrupt(s, vector, at))
            goto python;
        what |= SOFTWARE;
    } else {
        uint32_t error_code = FIELD(uint32_t, s, s->error_code);

        here = place_in_block(s, at);
        if (!here)
            goto python;
        if (here->shortcut && vector == GENERAL_PROTECTION && !error_code && (hflags & 3) == 1 && !(hflags & HF_LMA)) {
            const cuts *table = AT(const cuts *, AT(const uint64_t *, s->cuts)[s->current]);
            uint64_t next = (rip + here->next - (at - table->pc)) & 0xFFFFFFFF;

            if (on_virtual_cpu(s, here->shortcut, rip, next)) {
                here->hits++;
                leave_at(s, here);
                FIELD(int32_t, s, s->old_exception) = -1;
                FIELD(uint32_t, s, s->is_int) = 0;
                FIELD(uint64_t, s, EIP) = next;
                return;
            }
        }
        if (vector == PAGE_FAULT && s->faults && !(hflags & HF_LMA) && vmlab_hidden_fault(s, error_code)) {
            leave_at(s, here);
            FIELD(int32_t, s, s->old_exception) = -1;
            return;
        }
        s->left_at = at - AT(const cuts *, AT(const uint64_t *, s->cuts)[s->current])->pc;
        token = here->token;
        leave_at(s, here);
        if (vector < 32 && HAS_ERROR_CODE >> vector & 1)
            what |= WITH_ERROR_CODE | (uint64_t)error_code << ERROR_CODE_SHIFT;
    }
    FIELD(int32_t, s, s->old_exception) = -1;
    FIELD(uint32_t, s, s->is_int) = 0;
    s->what = what;
    s->token = token;
    AT(void (*)(void), s->on_trap)();
    set_cpl(s);
    return;
python:
    AT(void (*)(void *, uint32_t, void *), s->on_exception)(uc, vector, data);
}

/* A callout that a translator knows to do no more than this; 0: ask it. RIP is set where it succeeds. */
static int known_callout(state *s)
{
    const virtual_cpu *v = AT(const virtual_cpu *, s->virtual_cpu);
    uint32_t number = *AT(const uint32_t *, v->site), hflags = FIELD(uint32_t, s, HFLAGS);
    site *here;

    if (number >= s->site_count || hflags & HF_LMA || (hflags & 3) != 1 || FIELD(uint64_t, s, EFLAGS) & TF
        || FIELD(uint64_t, s, DS_BASE))
        return 0;
    here = &AT(site *, s->sites)[number];
    if (!here->what || *AT(const uint32_t *, v->flags) & IOPL
        || !on_virtual_cpu(s, here->what, here->rip, (here->rip + here->size) & 0xFFFFFFFF))
        return 0;
    here->hits++;
    FIELD(uint64_t, s, EIP) = here->after;
    return 1;
}

/* uc_cb_hookcode_t, at the exact address of a gate into a monitor */
EXPORT void vmlab_gate(void *uc, uint64_t address, uint32_t size, void *data)
{
    state *s = data;
    cut *here = s->stopped ? 0 : place_in_block(s, address);

    if (!here) {
        AT(void (*)(void *, uint64_t, uint32_t, void *), s->on_instruction)(uc, address, size, data);
        return;
    }
    leave_at(s, here);
    if (address != s->door || !known_callout(s)) {
        FIELD(uint64_t, s, EIP) = address - FIELD(uint64_t, s, CS_BASE);
        s->what = address;
        AT(void (*)(void), s->on_gate)();
        set_cpl(s);
    }
    AT(int (*)(void *, int, const void *), s->write_register)(uc, UC_X86_REG_RIP, &FIELD(uint64_t, s, EIP));
}
