# recipes.S: what each workload repeats. generate.S makes loops of these: `_4` holds four iterations, `_1` one.
# vmlab/guests/nano/counts.py restates them as arithmetic.
    .include "nano.inc"

    .globl workload_names, recipes_4, recipes_1

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

# compute: a user program of 60 001 instructions, and INT 0x80, the named instruction, once an iteration.
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
    .equ USER_COMPUTE_COUNT, 60001
    .equ USER_MIXED_COUNT, 62

    .align 4
raise_and_wait_at:
    .long raise_and_wait
enter_user_at:
    .long enter_user
    .pushsection .workload_names, "a"
    .long 0
    .popsection
