/* sites.h: the kinds of sensitive operations, and how one is written so that it can be patched.
 *
 * Each is native code inline: one instruction, made as long as its paravirtual replacement by redundant DS
 * prefixes (0x3e, ignored: SDM Vol. 2 section 2.1.1), so that the native kernel runs no instruction more. A table
 * lists every site; only the paravirtual entry patches them. A replacement keeps all registers that the native
 * instruction keeps, and may change the arithmetic flags. Registers below are named as in 32 bits; in 64 the whole
 * RAX, RDX, RDI and RCX are meant. */
#pragma once

/* Bytes of room, the second argument of SITE. */
#define ROOM_CALL 5
#define ROOM_CLI 7              /* movb $1, mask */
#define ROOM_INT 2              /* int $0x80 */
#ifdef __x86_64__               /* a store relative to RIP is longer than one to an absolute address */
#define ROOM_TPR 6
#define ROOM_STACK 7            /* a call, and two bytes that do nothing */
#else
#define ROOM_TPR 5
#define ROOM_STACK 5
#endif

#define K_CLI 0
#define K_STI 1
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
#define K_ROOT_NEW 20           /* EAX = address of a root's last entry (32 bits: its second), EDX = low word: it is complete */
#define K_ROOT_FREE 21          /* EAX = root, EDX = word to store in it: nothing uses this root any more */
#define K_TPR 22                /* EAX = task priority, to the local APIC or CR8 */
#define K_CONSOLE 23            /* call console_send(text, length) */
#define K_DISK 24               /* call disk_start(request) */
#define K_SYSENTER 25           /* in the user library, 32 bits only */

#ifdef __ASSEMBLER__
.macro SITE kind, room, insn:vararg
7710:
    .skip \room - (7720f - 7715f), 0x3e
7715:
    \insn
7720:
    .pushsection .sites, "a"
    .long 7710b                 /* where; all code is below 4 GiB */
    .byte 7720b - 7710b, \kind  /* room, kind */
    .word 0
    .popsection
.endm
#else
#define CALL_CLOBBERS "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "memory", "cc"     /* 64 bits, of a C function called here */
#define SITE(kind, room, insn) SITE_ROW(kind, room, insn)
#define SITE_ROW(kind, room, insn) \
    "7710: .skip " #room " - (7720f - 7715f), 0x3e\n7715:\t" insn "\n7720:\n\t" \
    ".pushsection .sites, \"a\"\n\t.long 7710b\n\t.byte 7720b - 7710b, " #kind "\n\t.word 0\n\t.popsection\n\t"
#endif
