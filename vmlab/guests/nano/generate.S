# generate.S: builds a workload's loop at boot, so that its density is exact.
# A recipe (recipes.S) lists the named instructions, the fixed instructions around them, and gaps.
# The gaps are filled with filler instructions until there are floor(named * 1000 / density) other
# instructions a pass, the two of the loop included. Named instructions are copied in their native form,
# and patched in the copy when paravirtual. Code lies on pages of its own, and is complete before it runs.
    .include "nano.inc"

    .text
    .globl generate, generate_user, generated_named, code_area
    .globl tape_at

# generate: EBX = recipe, EDI = where; EDI = behind the code, generated_named = instances a pass.
# The code is a function: ESI = passes; ends in DEC ESI, JNZ, RET.
generate:
    mov %edi, body_start
    xor %eax, %eax
    mov %eax, generated_named
    mov %eax, fixed
    mov %eax, gaps
    mov %eax, gap
    push %ebx
1:  movzbl 4(%ebx), %eax        # first reading: count
    movzwl 6(%ebx), %ecx
    cmp $R_GAP, %eax
    jne 2f
    incl gaps
    jmp 3f
2:  cmp $R_FIXED, %eax
    ja 4f
    add %ecx, fixed
    jmp 3f
4:  add %ecx, generated_named
3:  add $8, %ebx
    test %eax, %eax
    jnz 1b
    pop %ebx
    mov generated_named, %eax   # filler = named * 1000 / density - fixed - 2, or nothing
    imul $1000, %eax
    xor %edx, %edx
    divl density
    sub fixed, %eax
    sub $2, %eax
    jns 5f
    xor %eax, %eax
5:  mov %eax, filler
6:  movzbl 4(%ebx), %eax        # second reading: write
    test %eax, %eax
    jz 9f
    cmp $R_GAP, %eax
    jne 7f
    call fill_gap
    jmp 8f
7:  cmp $R_CREDIT, %eax
    je 8f
    call copy_piece
8:  add $8, %ebx
    jmp 6b
9:  movb $0x4e, (%edi)          # dec %esi
    movw $0x850f, 1(%edi)       # jnz body_start
    mov body_start, %eax
    sub %edi, %eax
    sub $7, %eax
    mov %eax, 3(%edi)
    movb $0xc3, 7(%edi)         # ret
    add $8, %edi
    ret

copy_piece:                     # EBX = recipe row of a site (a kind) or a fragment (an address)
    mov (%ebx), %esi
    movzbl 5(%ebx), %ecx
    test %ecx, %ecx
    jz 1f
    rep movsb
    ret
1:  mov %esi, %eax              # a site: its template, patched if paravirtual
    push %edi
    mov templates(, %eax, 8), %esi
    mov templates + 4(, %eax, 8), %ecx
    rep movsb
    mov %edi, %edx
    pop %edi
    push %edx
    cmp $K_RDTSC, %eax
    je 2f
    cmpl $0, paravirtual
    je 2f
    call patch
2:  pop %edi
    ret

fill_gap:                       # gap i of n takes (i + 1) * filler / n - i * filler / n instructions
    mov gap, %eax
    mull filler
    divl gaps
    mov %eax, %ecx
    incl gap
    mov gap, %eax
    mull filler
    divl gaps
    sub %ecx, %eax
    mov %eax, %ecx
    cmp $LOOP_WORTH, %eax       # many: a loop over the tape, as kernels have loops, and the rest in a line
    jb fill
    dec %eax
    xor %edx, %edx
    mov $TAPE_LENGTH + 2, %ecx
    div %ecx
    push %edx
    mov %eax, %edx
    mov $TAPE_LENGTH, %ecx
    call fill_loop
    pop %ecx
fill:                           # ECX filler instructions to EDI, going round the tape
    jecxz 3f
1:  push %ecx
    mov tape_at, %eax
    mov tape_index(, %eax, 4), %esi
    mov tape_index + 4(, %eax, 4), %ecx
    sub %esi, %ecx
    rep movsb
    inc %eax
    cmp $TAPE_LENGTH, %eax
    jb 2f
    xor %eax, %eax
2:  mov %eax, tape_at
    pop %ecx
    loop 1b
3:  ret

fill_loop:                      # a loop to EDI: EDX passes over ECX filler instructions, 1 + EDX * (ECX + 2) in all
    movb $0xb9, (%edi)          # mov $passes, %ecx
    mov %edx, 1(%edi)
    add $5, %edi
    push %edi
    call fill
    pop %eax
    movb $0x49, (%edi)          # dec %ecx
    movw $0x850f, 1(%edi)       # jnz
    sub %edi, %eax
    sub $7, %eax
    mov %eax, 3(%edi)
    add $7, %edi
    ret

# generate_user: EDI = where, ECX = filler instructions, EDX = passes (0: no loop); ends in INT 0x80.
generate_user:
    movl $0, tape_at
    test %edx, %edx
    jz 1f
    call fill_loop
    jmp 2f
1:  call fill
2:  movw $0x80cd, (%edi)        # int $0x80
    add $2, %edi
    ret

# --- the filler: a mix of register, load, store and branch instructions ---------------------------------
# It uses EDI and EBP as checksums, ECX for loops, absolute addresses, and no flags that matter; every instruction can be
# copied anywhere, and a branch goes to the next instruction whether it is taken or not.
    .section .rodata
    .equ TAPE_LENGTH, 40
    .equ LOOP_WORTH, 1 + 2 * (TAPE_LENGTH + 2)
.macro T insn:vararg
7760:
    \insn
    .pushsection .tape_index, "a"
    .long 7760b
    .popsection
.endm
    .pushsection .tape_index, "a"
    .align 4
tape_index:
    .popsection
    T add $0x9e3779b9, %edi
    T mov %edi, data + 0
    T rol $5, %edi
    T xor data + 4, %ebp
    T lea 7(%edi, %ebp, 2), %edi
    T mov %ebp, data + 8
    T add $13, %ebp
    T xor data + 0, %edi
    T rol $3, %ebp
    T .byte 0x73, 0             # jnc to the next instruction
    T add %edi, %ebp
    T mov %edi, data + 12
    T xor $0x5a5a5a5a, %ebp
    T mov data + 8, %edi
    T sub %ebp, %edi
    T mov %ebp, data + 4
    T lea 3(%ebp, %edi, 4), %ebp
    T add data + 12, %edi
    T not %edi
    T .byte 0xeb, 0             # jmp to the next instruction
    T xor %ebp, %edi
    T mov %edi, data + 16
    T ror $7, %ebp
    T add data + 20, %ebp
    T bswap %edi
    T mov %ebp, data + 24
    T add $0x01234567, %edi
    T xor data + 16, %ebp
    T shl $1, %edi
    T .byte 0x75, 0             # jnz to the next instruction
    T add %ebp, %edi
    T mov %edi, data + 20
    T neg %ebp
    T or $1, %ebp
    T mov data + 24, %edi
    T lea -5(%edi, %ebp), %edi
    T add %edi, data + 28
    T imul $17, %edi, %edi
    T xor data + 28, %ebp
    T .byte 0xeb, 0             # jmp to the next instruction
tape_end:
    .pushsection .tape_index, "a"
    .long tape_end
    .popsection

# --- native forms of the named instructions, by kind: address, length -----------------------------------
.macro TEMPLATE padding, insn:vararg
    .pushsection .templates, "ax"
7770:
    .fill \padding, 1, 0x3e
    \insn
7780:
    .popsection
    .long 7770b, 7780b - 7770b
.endm
    .align 4
templates:
    TEMPLATE 6, cli
    TEMPLATE 4, sti
    TEMPLATE 4, pushf
    TEMPLATE 4, popf
    TEMPLATE 4, in %dx, %al
    TEMPLATE 4, out %al, %dx
    TEMPLATE 4, out %eax, %dx
    TEMPLATE 5, cpuid
    .long 0, 0                  # the last three are never copied
    .long 0, 0
    .long 0, 0
    TEMPLATE 0, rdtsc

    .bss
    .align 4
body_start:
    .skip 4
generated_named:
    .skip 4
fixed:
    .skip 4
gaps:
    .skip 4
gap:
    .skip 4
filler:
    .skip 4
tape_at:
    .skip 4
    .section .code_area, "awx", @nobits
    .balign 4096
code_area:
    .skip 0x60000
