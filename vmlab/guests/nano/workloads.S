# workloads.S: runs the chosen workload, with the region of interest around it; the recipes are in recipes.S.
# The region lasts from the first arrival at vmlab_roi_begin to the arrival at vmlab_roi_end. N iterations are
# N % 4 passes of a loop that holds one, then N / 4 passes of a loop that holds four, the first of them cold.
# vmlab/guests/nano/counts.py says how many instructions that is; a test counts them.
    .include "nano.inc"

    .equ RAISE_BOUND, 10000     # times to look for an interrupt before giving up

    .text
    .globl prepare_workload, run_workload, uart_interrupt, outcome_checksum
    .globl kernel_esp, data, enter_user, raise_and_wait, user_compute, user_mixed
    .globl outcome_failed, outcome_if_inside, outcome_if_after, outcome_port, outcome_tsc_backwards
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
    mov $248, %ecx
    mov $240, %edx
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
