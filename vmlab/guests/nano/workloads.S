# workloads.S: what each workload repeats, and the region of interest around it.
# The region lasts from the first arrival at vmlab_roi_begin to the arrival at vmlab_roi_end. N iterations are
# N % 4 passes of a loop that holds one, then N / 4 passes of a loop that holds four, the first of them cold.
# vmlab/guests/nano/counts.py says how many instructions that is; a test counts them.
    .include "nano.inc"

    .equ RAISE_BOUND, 10000     # times to look for an interrupt before giving up

    .text
    .globl prepare_workload, run_workload, uart_interrupt, outcome_checksum
    .globl workload_names, kernel_esp, data, outcome_failed
    .globl vmlab_roi_begin, vmlab_roi_warm, vmlab_roi_end, vmlab_outcome_start, vmlab_outcome_end, vmlab_work

    .balign 16
vmlab_roi_begin:
    ret
    .balign 16
vmlab_roi_warm:
    ret
    .balign 16
vmlab_roi_end:
    ret

prepare_workload:               # build both loops and the user programs
    mov $code_area, %edi
    mov workload, %eax
    mov recipes_4(, %eax, 4), %ebx
    movl $0, tape_at
    mov %edi, body_4
    call generate
    mov generated_named, %eax
    mov %eax, named_4
    mov workload, %eax
    mov recipes_1(, %eax, 4), %ebx
    movl $0, tape_at
    call next_page
    mov %edi, body_1
    call generate
    mov generated_named, %eax
    mov %eax, named_1
    call next_page
    mov %edi, user_compute
    mov $245, %ecx
    mov $4, %edx
    call generate_user
    call next_page
    mov %edi, user_mixed
    mov $62, %ecx
    xor %edx, %edx
    call generate_user
    mov iterations, %eax
    mov %eax, %edx
    and $3, %edx
    mov %edx, singles
    shr $2, %eax
    mov %eax, fours
    xor %edx, %edx
    test %eax, %eax
    setnz %dl
    mov %edx, fours_cold
    sub %edx, %eax
    mov %eax, fours_warm
    jmp uart_drain
next_page:
    add $4095, %edi
    and $-4096, %edi
    ret

run_workload:
    STI_
    xor %eax, %eax
    xor %ebx, %ebx
    xor %ecx, %ecx
    mov $UART_SCR, %edx
    mov $0x12345678, %edi
    mov $0x0badcafe, %ebp
    mov %esp, run_esp
    call vmlab_roi_begin
    mov singles, %esi
    test %esi, %esi
    jz 1f
    call *body_1
1:  mov fours_cold, %esi
    test %esi, %esi
    jz 2f
    call *body_4
2:  call vmlab_roi_warm
    mov fours_warm, %esi
    test %esi, %esi
    jz 3f
    call *body_4
3:
run_over:
    call vmlab_roi_end
    CLI_
    mov %edi, outcome_edi
    mov %ebp, outcome_ebp
    mov $data, %esi             # what the filler left in memory
    mov $8, %ecx
    xor %edx, %edx
4:  lodsl
    rol $3, %edx
    xor %eax, %edx
    loop 4b
    mov %edx, outcome_data
    cmpl $0, outcome_failed
    jne 5f
    mov singles, %eax
    mull named_1
    mov %eax, vmlab_work
    mov fours, %eax
    mull named_4
    add %eax, vmlab_work
    mov iterations, %eax
    mov %eax, vmlab_work + 4
    ret
5:  mov interrupts_seen, %eax   # given up: only these are known to have happened
    mov %eax, vmlab_work
    ret

workload_failed:
    movl $1, outcome_failed
    mov run_esp, %esp
    jmp run_over

outcome_checksum:               # EAX = all outcome bytes, folded
    mov $vmlab_outcome_start, %esi
    mov $(vmlab_outcome_end - vmlab_outcome_start) / 4, %ecx
    xor %edx, %edx
1:  lodsl
    rol $5, %edx
    xor %eax, %edx
    loop 1b
    mov %edx, %eax
    ret

# enter_user: ECX = user program. It runs in ring 3 until its INT 0x80, whose handler returns for us.
enter_user:
    mov %esp, kernel_esp
    push user_ss
    push $user_stack_top
    push $0x202
    push user_cs
    push %ecx
    IRET_

# raise_and_wait: two interrupts by the UART. The first is awaited by STI;HLT with interrupts off until then;
# the second needs the interrupt flag that the first one's IRET gave back.
raise_and_wait:
    CLI_
    incl interrupts_wanted
    mov $UART_IER, %edx
    mov $2, %eax                # the transmitter is empty: enabling its interrupt raises it
    OUTB_
    mov $RAISE_BOUND, %ecx
1:  SAFE_HALT_
    mov interrupts_seen, %eax
    cmp interrupts_wanted, %eax
    je 2f
    CLI_                        # woken by something else: look again with interrupts off
    mov interrupts_seen, %eax
    cmp interrupts_wanted, %eax
    je 5f
    dec %ecx
    jnz 1b
    jmp workload_failed
5:  STI_
2:  incl interrupts_wanted
    mov $2, %eax
    OUTB_
    jmp 3f                      # the interrupt may be taken here
3:  mov interrupts_seen, %eax
    cmp interrupts_wanted, %eax
    je 4f
    dec %ecx
    jnz 3b
    jmp workload_failed
4:  ret

uart_interrupt:                 # called by both interrupt entries, all registers saved
    mov $UART_IIR, %edx
    INB_
    movzbl %al, %eax
    add %eax, outcome_iir
    mov $UART_IER, %edx
    xor %eax, %eax
    OUTB_
    incl interrupts_seen
    ret

# --- recipes: `_4` holds four iterations, `_1` one --------------------------------------------------------
    .section .rodata
.macro WORKLOAD name
    .pushsection .workload_names, "a"
    .long 7810f
    .popsection
    .pushsection .rodata.text, "a"
7810: .asciz "\name"
    .popsection
    .pushsection .recipes_4, "a"
    .long recipe_\name\()_4
    .popsection
    .pushsection .recipes_1, "a"
    .long recipe_\name\()_1
    .popsection
.endm
    .pushsection .workload_names, "a"
workload_names:
    .popsection
    .pushsection .recipes_4, "a"
recipes_4:
    .popsection
    .pushsection .recipes_1, "a"
recipes_1:
    .popsection
    .align 4

# cli_sti: CLI and STI, two instances an iteration.
.macro UNIT_CLI_STI
    NAMED K_CLI
    GAP
    NAMED K_STI
    GAP
.endm
    WORKLOAD cli_sti
recipe_cli_sti_4:
    .rept 4
    UNIT_CLI_STI
    .endr
    END
recipe_cli_sti_1:
    UNIT_CLI_STI
    END

# pushf_popf: save, disable, restore; once a pass the flag is looked at while disabled and afterwards.
.macro UNIT_PUSHF
    NAMED K_PUSHF
    OTHER K_CLI
    GAP
.endm
.macro LOOK where
    NAMED K_PUSHF
    FRAGMENT
    pop %eax
    and $EFLAGS_IF, %eax
    add %eax, \where
    FRAGMENT_END 3
.endm
    WORKLOAD pushf_popf
recipe_pushf_popf_4:
    .rept 3
    UNIT_PUSHF
    NAMED K_POPF
    GAP
    .endr
recipe_pushf_popf_1:
    UNIT_PUSHF
    LOOK outcome_if_inside
    NAMED K_POPF
    GAP
    LOOK outcome_if_after
    END

# port_io: the UART's scratch register is written and read; every second iteration reads its line status
# instead. EDX = the scratch register's port throughout.
.macro UNIT_OUT
    FRAGMENT
    mov %edi, %eax
    FRAGMENT_END 1
    NAMED K_OUTB
    GAP
.endm
.macro UNIT_ADD
    FRAGMENT
    add %eax, outcome_port
    FRAGMENT_END 1
    GAP
.endm
.macro UNIT_SCRATCH
    UNIT_OUT
    NAMED K_INB
    UNIT_ADD
.endm
.macro UNIT_STATUS
    UNIT_OUT
    FRAGMENT
    mov $UART_LSR & 0xff, %dl
    FRAGMENT_END 1
    NAMED K_INB
    FRAGMENT
    mov $UART_SCR & 0xff, %dl
    FRAGMENT_END 1
    UNIT_ADD
.endm
    WORKLOAD port_io
recipe_port_io_4:
    UNIT_SCRATCH
    UNIT_STATUS
    UNIT_SCRATCH
    UNIT_STATUS
    END
recipe_port_io_1:
    UNIT_SCRATCH
    END

# cpuid: leaf 0. What it says is no part of the outcome: a VMM may mask it.
.macro UNIT_CPUID
    FRAGMENT
    xor %eax, %eax
    FRAGMENT_END 1
    NAMED K_CPUID
    GAP
.endm
    WORKLOAD cpuid
recipe_cpuid_4:
    .rept 3
    UNIT_CPUID
    .endr
recipe_cpuid_1:
    UNIT_CPUID
    END

# rdtsc: the last reading of a pass must not lie before the first.
.macro FIRST_TSC
    NAMED K_RDTSC
    FRAGMENT
    mov %eax, %ebx
    mov %edx, %ecx
    FRAGMENT_END 2
    GAP
.endm
.macro CHECK_TSC
    FRAGMENT
    sub %ebx, %eax
    sbb %ecx, %edx
    adcl $0, outcome_tsc_backwards
    FRAGMENT_END 3
    GAP
.endm
    WORKLOAD rdtsc
recipe_rdtsc_4:
    FIRST_TSC
    .rept 2
    NAMED K_RDTSC
    GAP
    .endr
    NAMED K_RDTSC
    CHECK_TSC
    END
recipe_rdtsc_1:
    FIRST_TSC
    CHECK_TSC
    END

# interrupt: two interrupts an iteration.
.macro UNIT_INTERRUPT
    FRAGMENT
    call *raise_and_wait_at
    FRAGMENT_END RAISE_AND_WAIT_COUNT
    CREDIT 2
    GAP
.endm
    WORKLOAD interrupt
recipe_interrupt_4:
    .rept 3
    UNIT_INTERRUPT
    .endr
recipe_interrupt_1:
    UNIT_INTERRUPT
    END

# compute: a user program of 990 instructions, and INT 0x80, the named instruction, once an iteration.
.macro UNIT_USER program, others
    FRAGMENT
    mov \program, %ecx
    call *enter_user_at
    FRAGMENT_END \others + 2 + ENTER_USER_COUNT
    CREDIT 1
.endm
    WORKLOAD compute
recipe_compute_4:
    .rept 3
    UNIT_USER user_compute, USER_COMPUTE_COUNT
    .endr
recipe_compute_1:
    UNIT_USER user_compute, USER_COMPUTE_COUNT
    END

# mixed: everything once; two interrupts, a short user program.
.macro UNIT_MIXED
    UNIT_CLI_STI
    UNIT_PUSHF
    LOOK outcome_if_inside
    NAMED K_POPF
    GAP
    FRAGMENT
    mov $UART_SCR, %edx
    FRAGMENT_END 1
    UNIT_SCRATCH
    UNIT_CPUID
    FIRST_TSC
    UNIT_INTERRUPT
    UNIT_USER user_mixed, USER_MIXED_COUNT
.endm
    WORKLOAD mixed
recipe_mixed_4:
    .rept 3
    UNIT_MIXED
    .endr
recipe_mixed_1:
    UNIT_MIXED
    END

    # Instructions of each, natively; the IN, OUT, CLI, STI, HLT and IRET in them are "other" here.
    .equ RAISE_AND_WAIT_COUNT, 50
    .equ ENTER_USER_COUNT, 9
    .equ USER_COMPUTE_COUNT, 989
    .equ USER_MIXED_COUNT, 62

    .align 4
raise_and_wait_at:
    .long raise_and_wait
enter_user_at:
    .long enter_user
    .pushsection .workload_names, "a"
    .long 0
    .popsection

    .data
    .align 16
data:                           # what the filler works on
    .long 1, 2, 3, 5, 8, 13, 21, 34

# The outcome: depends neither on when interrupts come nor on what the TSC or CPUID says.
vmlab_outcome_start:
outcome_edi:
    .long 0
outcome_ebp:
    .long 0
outcome_data:
    .long 0
outcome_port:                   # sum of what the ports gave back
    .long 0
outcome_if_inside:              # the interrupt flag seen between PUSHF;CLI and POPF: 0
    .long 0
outcome_if_after:               # and after POPF: 0x200 each time
    .long 0
outcome_tsc_backwards:          # times the TSC ran backwards: 0
    .long 0
outcome_iir:                    # sum of the interrupt identifications: 2 an interrupt
    .long 0
interrupts_seen:
    .long 0
interrupts_wanted:
    .long 0
outcome_failed:                 # 1: an interrupt never arrived
    .long 0
vmlab_work:                     # operations (named instances carried out), iterations
    .long 0, 0
vmlab_outcome_end:

    .bss
    .align 16
body_4:
    .skip 4
body_1:
    .skip 4
named_4:
    .skip 4
named_1:
    .skip 4
singles:
    .skip 4
fours:
    .skip 4
fours_cold:
    .skip 4
fours_warm:
    .skip 4
user_compute:
    .skip 4
user_mixed:
    .skip 4
run_esp:
    .skip 4
kernel_esp:
    .skip 4
    .balign 4096
user_stack:
    .skip 4096
user_stack_top:
