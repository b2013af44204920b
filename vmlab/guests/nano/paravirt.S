# paravirt.S: the paravirtual entry, described by ELF notes, and what replaces the native instructions.
# Facts of the interface: xen/include/public/{elfnote,xen,arch-x86/xen-x86_32,event_channel,sched}.h.
# The kernel runs in ring 1 with the segments it was started with; hypercalls go through the hypercall
# page (number * 32): EAX = number, arguments in EBX ECX EDX ESI EDI, which a call may change.
    .include "nano.inc"

    .equ HYPERCALL_SET_TRAP_TABLE, 0
    .equ HYPERCALL_STACK_SWITCH, 3
    .equ HYPERCALL_SET_CALLBACKS, 4
    .equ HYPERCALL_UPDATE_VA_MAPPING, 14
    .equ HYPERCALL_XEN_VERSION, 17
    .equ HYPERCALL_CONSOLE_IO, 18
    .equ HYPERCALL_IRET, 23
    .equ HYPERCALL_SCHED_OP, 29
    .equ HYPERCALL_EVENT_CHANNEL_OP, 32
    .equ HYPERCALL_PORT_IO, 55  # the lab's own (__HYPERVISOR_arch_7): op, port, size, value

    .equ FLAT_RING1_CS, 0xe019
    .equ FLAT_RING3_CS, 0xe02b
    .equ FLAT_RING3_DS, 0xe033
    .equ START_INFO_SHARED, 36  # struct start_info, 32-bit
    .equ START_INFO_CMD_LINE, 80
    .equ UPCALL_PENDING, shared_info + 0    # struct vcpu_info of vCPU 0
    .equ UPCALL_MASK, shared_info + 1
    .equ PENDING_SELECTOR, shared_info + 4
    .equ EVENT_PENDING, shared_info + 2048  # one bit a port
    .equ EVTCHNOP_BIND_PIRQ, 2
    .equ EVTCHNOP_UNMASK, 9
    .equ SCHEDOP_BLOCK, 1

.macro HYPERCALL number
    call hypercall_page + \number * 32
.endm

    .section .note.Xen, "a", @note
.macro NOTE type, desc:vararg
    .align 4
    .long 4, 7750f - 7740f, \type
    .asciz "Xen"
7740:
    \desc
7750:
    .align 4
.endm
    NOTE 6, .asciz "nano"           # GUEST_OS
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
hypercall_page:
    .fill 4096, 1, 0xcc             # the hypervisor fills it

    .text
    .globl pv_start, patch, paravirtual
pv_start:                       # ESI = start_info; events masked; paging on, memory mapped one to one
    cld
    mov $stack_top, %esp
    mov %esi, %ebp
    movl $FLAT_RING3_CS, user_cs
    movl $FLAT_RING3_DS, user_ss
    mov user_ss, %eax           # as natively: flat data segments of DPL 3
    mov %eax, %ds
    mov %eax, %es
    mov START_INFO_SHARED(%ebp), %ecx       # machine address of shared_info: map it over our own page
    or $0x3, %ecx               # present, writable; a page table entry of 8 bytes
    mov $shared_info, %ebx
    xor %edx, %edx
    mov $2, %esi                # UVMF_INVLPG
    HYPERCALL HYPERCALL_UPDATE_VA_MAPPING
    mov $pv_traps, %ebx
    HYPERCALL HYPERCALL_SET_TRAP_TABLE
    mov %ss, %ebx
    mov $trap_stack_top, %ecx
    HYPERCALL HYPERCALL_STACK_SWITCH
    mov $FLAT_RING1_CS, %ebx
    mov $pv_upcall, %ecx
    mov $FLAT_RING1_CS, %edx
    mov $pv_failsafe, %esi
    HYPERCALL HYPERCALL_SET_CALLBACKS
    movl $4, pv_bind            # the UART's interrupt, IRQ 4, comes as an event
    mov $EVTCHNOP_BIND_PIRQ, %ebx
    mov $pv_bind, %ecx
    HYPERCALL HYPERCALL_EVENT_CHANNEL_OP
    mov pv_bind + 8, %eax
    mov %eax, pv_unmask
    mov $EVTCHNOP_UNMASK, %ebx
    mov $pv_unmask, %ecx
    HYPERCALL HYPERCALL_EVENT_CHANNEL_OP
    call pv_patch_all
    call uart_setup
    lea START_INFO_CMD_LINE(%ebp), %ebx
    jmp main

# --- patching ----------------------------------------------------------------------------------------
pv_patch_all:
    movl $1, paravirtual
    mov $sites, %ebx
1:  cmp $sites_end, %ebx
    jae 2f
    mov (%ebx), %edi
    movzbl 5(%ebx), %eax
    call patch
    add $8, %ebx
    jmp 1b
2:  ret

patch:                          # EDI = site, EAX = kind: overwrite it. Changes EAX, ECX, EDX
    mov replacements(, %eax, 8), %edx       # 0: literal bytes, else the opcode of CALL or JMP rel32
    mov replacements + 4(, %eax, 8), %ecx
    test %edx, %edx
    jz 1f
    mov %dl, (%edi)
    sub $5, %ecx
    sub %edi, %ecx
    mov %ecx, 1(%edi)
    ret
1:  push %esi
    push %edi
    mov %ecx, %esi
    mov $7, %ecx
    rep movsb
    pop %edi
    pop %esi
    ret

    .section .rodata
    .align 4
replacements:                   # by kind
    .long 0, literal_cli
    .long 0xe8, pv_sti
    .long 0xe8, pv_pushf
    .long 0xe8, pv_popf
    .long 0xe8, pv_inb
    .long 0xe8, pv_outb
    .long 0xe8, pv_outl
    .long 0, literal_cpuid
    .long 0xe8, pv_safe_halt
    .long 0xe9, hypercall_page + HYPERCALL_IRET * 32
    .long 0xe9, pv_puts
literal_cli:
    movb $1, UPCALL_MASK        # seven bytes
literal_cpuid:
    ud2                         # Xen's forced-emulation prefix: ud2; "xen"
    .ascii "xen"
    cpuid

# --- replacements: each keeps every general register --------------------------------------------------
    .text
pv_sti:
    movb $0, UPCALL_MASK
    cmpb $0, UPCALL_PENDING     # an event between these two is taken at once; one before them, now
    jne pv_take_events
    ret
pv_take_events:                 # any hypercall delivers pending events on its way back
    pusha
    xor %ebx, %ebx              # XENVER_version
    xor %ecx, %ecx
    HYPERCALL HYPERCALL_XEN_VERSION
    popa
    ret

pv_pushf:                       # only IF means anything in the word
    push (%esp)
    movl $0x202, 4(%esp)
    cmpb $0, UPCALL_MASK
    je 1f
    movl $0x002, 4(%esp)
1:  ret

pv_popf:
    testl $EFLAGS_IF, 4(%esp)
    jz 1f
    movb $0, UPCALL_MASK
    cmpb $0, UPCALL_PENDING
    je 2f
    call pv_take_events
2:  ret $4
1:  movb $1, UPCALL_MASK
    ret $4

pv_inb:
    push %eax
    push %ebx
    push %ecx
    push %edx
    push %esi
    xor %ebx, %ebx              # 0: input
    movzwl %dx, %ecx
    mov $1, %edx
    HYPERCALL HYPERCALL_PORT_IO
    pop %esi
    pop %edx
    pop %ecx
    pop %ebx
    mov %al, (%esp)             # IN changes AL only
    pop %eax
    ret

pv_outl:
    push $4
    jmp 1f
pv_outb:
    push $1
1:  push %eax
    push %ebx
    push %ecx
    push %edx
    push %esi
    mov $1, %ebx                # 1: output
    movzwl %dx, %ecx
    mov 20(%esp), %edx
    mov %eax, %esi
    HYPERCALL HYPERCALL_PORT_IO
    pop %esi
    pop %edx
    pop %ecx
    pop %ebx
    pop %eax
    lea 4(%esp), %esp
    ret

pv_safe_halt:                   # lets events in, and waits for one unless one is there already
    pusha
    mov $SCHEDOP_BLOCK, %ebx
    xor %ecx, %ecx
    HYPERCALL HYPERCALL_SCHED_OP
    popa
    ret

pv_puts:                        # CONSOLEIO_write of the line buffer
    push %ebx
    push %ecx
    xor %ebx, %ebx
    mov line_end, %ecx
    mov $line, %edx
    sub %edx, %ecx
    HYPERCALL HYPERCALL_CONSOLE_IO
    pop %ecx
    pop %ebx
    ret

# --- events ------------------------------------------------------------------------------------------
pv_upcall:                      # the frame of an interrupt; upcalls are masked meanwhile
    pusha
    movb $0, UPCALL_PENDING     # before looking, so that none is missed
    xor %eax, %eax
    xchg %eax, PENDING_SELECTOR
    test $1, %eax               # ports 0..31 are all that this kernel can have
    jz 1f
    mov pv_bind + 8, %ecx
    btr %ecx, EVENT_PENDING
    jnc 1f
    call uart_interrupt
1:  popa
    IRET_                       # gives the mask its old value and delivers what came meanwhile

pv_failsafe:                    # EIP ESP-relative DS ES FS GS frame: only a broken return comes here
    mov $4, %eax
    jmp exit

    .data
    .align 4
paravirtual:
    .long 0
pv_bind:                        # struct evtchn_bind_pirq: pirq, flags, port
    .long 0, 0, 0
pv_unmask:                      # struct evtchn_unmask: port
    .long 0
    # struct trap_info: vector, flags (0-1: privilege level, 2: mask events), selector, address
    .macro TRAP vector, flags, address
    .byte \vector, \flags
    .word FLAT_RING1_CS
    .long \address
    .endm
pv_traps:                       # exceptions find the native stubs: the frames are the same
    .altmacro
.macro FAULT_TRAP vector
    TRAP \vector, 4, fault_stub_\vector
.endm
    .set n, 0
    .rept 20
    .if (n != 2) && (n != 15)
    FAULT_TRAP %n
    .endif
    .set n, n + 1
    .endr
    .noaltmacro
    TRAP 0x80, 3, trap_syscall
    .long 0, 0

    .bss
    .balign 4096
    .globl shared_info
shared_info:
    .skip 4096
