# pv.S: the paravirtual entry, described by ELF notes; what takes the place of sensitive instructions; and the way in
# for events and out for everything. The kernel runs in ring 1. Facts: xen/include/public/elfnote.h, xen.h, sched.h.
#include "types.h"
#include "sites.h"
#include "pv.h"

    .section .note.Xen, "a", @note
.macro NOTE type, desc:vararg
    .balign 4
    .long 4, 7750f - 7740f, \type
    .asciz "Xen"
7740:
    \desc
7750:
    .balign 4
.endm
    NOTE 6, .asciz "minios"         # GUEST_OS
    NOTE 5, .asciz "xen-3.0"        # XEN_VERSION
    NOTE 8, .asciz "generic"        # LOADER
    NOTE 9, .asciz "yes"            # PAE_MODE
    NOTE 10, .asciz ""              # FEATURES: none needed
    NOTE 3, .long 0                 # VIRT_BASE
    NOTE 4, .long 0                 # PADDR_OFFSET
    NOTE 1, .long pv_start          # ENTRY
    NOTE 2, .long hypercall_page    # HYPERCALL_PAGE

    .section .hypercall, "ax"
    .balign 4096
    .globl hypercall_page
hypercall_page:                 # the hypervisor fills it
    .fill 4096, 1, 0xcc

    .bss
    .balign 4096
    .globl shared_info
shared_info:                    # the hypervisor's page is mapped over this one
    .skip 4096

    .text
pv_start:                       # ESI = struct start_info; paging on, memory one to one, events held off
    cld
    mov $boot_stack_top, %esp
    mov $FLAT_RING3_DS, %eax    # as natively: flat and of DPL 3 for good
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov %esi, %eax
    call pv_setup               # pv.c
    call main

# --- what takes the place of a site; pv.c has the table. Each keeps what the native instruction keeps.
    .globl pv_sti, pv_pushf, pv_popf, pv_halt, pv_in_byte, pv_in_word, pv_out_byte, pv_out_word
    .globl pv_entry_read, pv_table_new, pv_iret, pv_upcall, pv_failsafe, pv_critical, pv_critical_end
pv_sti:
    movb $0, UPCALL_MASK
    cmpb $0, UPCALL_PENDING     # an event after this is an upcall at once; one before it is still to be looked at
    jne take_events
    ret
take_events:                    # as if it had come now: the frame of an upcall, and on to its handler
    movb $1, UPCALL_MASK
    push $0x202
    push $FLAT_RING1_CS
    push $1f
    jmp handle_events
1:  ret

pv_pushf:                       # only IF means anything in the word
    push (%esp)
    movl $0x202, 4(%esp)
    cmpb $0, UPCALL_MASK
    je 1f
    movl $0x002, 4(%esp)
1:  ret

pv_popf:
    testl $FLAG_IF, 4(%esp)
    jz 1f
    call pv_sti
    ret $4
1:  movb $1, UPCALL_MASK
    ret $4

pv_halt:                        # lets events in, and waits for one unless one is there already
    pusha
    mov $SCHEDOP_BLOCK, %ebx
    xor %ecx, %ecx
    call hypercall_page + HYPERCALL_SCHED_OP * 32
    popa
    ret

# IN and OUT by hypercall: EBX = 1 for OUT, ECX = port, EDX = size, ESI = value.
.macro PORT name, write, size
pv_\name:
    push %ebx
    push %ecx
    push %edx
    push %esi
    mov $\write, %ebx
    movzwl %dx, %ecx
    mov $\size, %edx
    mov %eax, %esi
    .if \write
    push %eax
    .endif
    call hypercall_page + HYPERCALL_PORT_IO * 32
    .if \write
    pop %eax
    .endif
    pop %esi
    pop %edx
    pop %ecx
    pop %ebx
    ret
.endm
    PORT in_byte, 0, 1          # EAX's upper bytes become 0: the C code looks at AL only
    PORT in_word, 0, 4
    PORT out_byte, 1, 1
    PORT out_word, 1, 4

# A function of C's with up to two arguments, EAX and EDX; keeps every register.
.macro CALL_C name, function
    .globl \name
\name:
    push %eax
    push %ecx
    push %edx
    call \function
    pop %edx
    pop %ecx
    pop %eax
    ret
.endm
    CALL_C pv_entry_write, entry_write_queued
    CALL_C pv_entry_write_now, entry_write_sent
    CALL_C pv_load_cr3, root_load
    CALL_C pv_flush, tlb_flush
    CALL_C pv_invlpg, page_flush
    CALL_C pv_set_stack, stack_set
    CALL_C pv_table_free, table_no_more
    CALL_C pv_root_new, root_made
    CALL_C pv_root_free, root_no_more

pv_entry_read:                  # EAX = address; gives EAX. The usual case of entry_value in pv_pages.c, for whole tables are read
    push %ecx
    push %edx
    mov %eax, %ecx
    mov %eax, %edx
    shr $3, %ecx
    shr $12, %edx
    xor %edx, %ecx
    and $511, %ecx
    bt %ecx, entries_touched
    jc 3f
    mov (%eax), %eax
    test $1, %al
    jz 2f
    mov %eax, %ecx
    shr $12, %eax
    mov MACHINE_TO_PHYS(, %eax, 4), %eax
    shl $12, %eax
    and $0xfff, %ecx
    or %ecx, %eax
2:  pop %edx
    pop %ecx
    ret
3:  call entry_value
    jmp 2b

pv_table_new:                   # EDI = page, ECX = 1024, EAX = 0
    rep stosl
    push %eax
    push %ecx
    push %edx
    lea -PAGE(%edi), %eax
    call table_made
    pop %edx
    pop %ecx
    pop %eax
    ret

# --- the way out. A kernel that lets events in and then returns has a moment between the two. An event before it must not
# wait for the next one, so the pending flag is looked at once more; an event within it finds nothing on the stack but
# the frame that is about to be returned through, and takes that frame for its own: no event is lost, and however
# many come, the stack does not grow.
pv_iret:                        # the frame of an interrupt; IF in it says whether events are let in
    testl $FLAG_IF, 8(%esp)
    jz 2f
    movb $0, UPCALL_MASK
pv_critical:
    cmpb $0, UPCALL_PENDING
    jne 1f
    iret
1:  movb $1, UPCALL_MASK
pv_critical_end:
    jmp handle_events
2:  movb $1, UPCALL_MASK
    iret

# --- the way in for events: the frame of an interrupt, on the kernel's stack; further events are held off.
pv_upcall:
    testb $2, 4(%esp)           # from user mode: certainly not from there
    jnz handle_events
    cmpl $pv_critical, (%esp)
    jb handle_events
    cmpl $pv_critical_end, (%esp)
    jae handle_events
    add $12, %esp               # forget that frame: the one below is as good
handle_events:
    push $0
    push $EVENT
    pusha
    cld
    mov %esp, %eax
    call pv_events              # pv.c
    jmp fork_return

pv_failsafe:                    # EIP ESP-relative DS ES FS GS frame: only a broken return comes here
    mov $6, %eax
    call shut_down
