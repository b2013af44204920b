/* sites.h: the kinds of sensitive operations, and how one is written so that it can be patched.
 *
 * Each is native code inline: one instruction, made as long as its paravirtual replacement by redundant DS
 * prefixes (0x3e, ignored: SDM Vol. 2 section 2.1.1), so that the native kernel runs no instruction more. A table
 * lists every site; only the paravirtual entry patches them. A replacement keeps all registers that the native
 * instruction keeps, and may change the arithmetic flags. The 64-bit kernel has no paravirtual half: no table. */
#pragma once

#define K_CLI 0                 /* 7 bytes: room for movb $1, mask */
#define K_STI 1                 /* this one and all below: 5 bytes, room for a call, unless it says otherwise */
#define K_PUSHF 2
#define K_POPF 3
#define K_IRET 4
#define K_HALT 5                /* STI;HLT as a pair */
#define K_IN_BYTE 6             /* DX port, AL value */
#define K_IN_WORD 7             /* DX port, EAX value */
#define K_OUT_BYTE 8
#define K_OUT_WORD 9
#define K_LOAD_CR3 10           /* EAX = root: another address space */
#define K_FLUSH 11              /* EAX = root: the same one again, to empty the TLB */
#define K_INVLPG 12             /* EAX = address */
#define K_READ_CR2 13           /* gives EAX */
#define K_SET_STACK 14          /* EAX = kernel stack for the next entry from user mode */
#define K_ENTRY_READ 15         /* EAX = address of a page-table entry; gives EAX = its low word */
#define K_ENTRY_WRITE 16        /* EAX = address, EDX = low word: in force at the latest at the next of 17, 10, 11, 12 */
#define K_ENTRY_WRITE_NOW 17    /* the same, and in force at once with all before it */
#define K_TABLE_NEW 18          /* EDI = page, ECX = 1024, EAX = 0: clear it; from here on it is a page table */
#define K_TABLE_FREE 19         /* EAX = page, EDX = word to store in it: it is no page table any more */
#define K_ROOT_NEW 20           /* EAX = address of entry 1 of a root, EDX = low word: with it the root is complete */
#define K_ROOT_FREE 21          /* EAX = root, EDX = word to store in it: nothing uses this root any more */
#define K_TPR 22                /* EAX = task priority, to the local APIC */
#define K_CONSOLE 23            /* call console_send(EAX text, EDX length) */
#define K_DISK 24               /* call disk_start(EAX request) */
#define K_SYSENTER 25           /* in the user library, 2 bytes: room for INT 0x80 */

#ifdef __ASSEMBLER__
#ifdef __x86_64__
.macro SITE kind, padding, insn:vararg
    \insn
.endm
#else
.macro SITE kind, padding, insn:vararg
7710:
    .fill \padding, 1, 0x3e
    \insn
7720:
    .pushsection .sites, "a"
    .long 7710b                 /* where */
    .byte 7720b - 7710b, \kind  /* room, kind */
    .word 0
    .popsection
.endm
#endif
#else
#define TEXT_OF(x) #x
#ifdef __x86_64__
#define SITE(kind, padding, insn) insn "\n\t"
#else
#define SITE(kind, padding, insn) SITE_ROW(kind, padding, insn)
#define SITE_ROW(kind, padding, insn) \
    "7710: .fill " #padding ", 1, 0x3e\n\t" insn "\n7720:\n\t" \
    ".pushsection .sites, \"a\"\n\t.long 7710b\n\t.byte 7720b - 7710b, " #kind "\n\t.word 0\n\t.popsection\n\t"
#endif
#endif
