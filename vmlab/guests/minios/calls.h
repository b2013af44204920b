/* calls.h: the system calls, and what two of them can be asked for. For the kernel and for user programs. */
#pragma once

enum call {
    CALL_NULL,              /* nothing: gives the process's id */
    CALL_EXIT,              /* (result) */
    CALL_FORK,              /* gives the child's id, 0 in the child, -1 when there are too many processes */
    CALL_WAIT,              /* gives the result of a child that has gone, or -1 when there is none */
    CALL_EXEC,              /* (program, argument): from the start, in fresh memory */
    CALL_YIELD,
    CALL_SLEEP,             /* (ticks) */
    CALL_TICKS,             /* gives the ticks so far */
    CALL_MAP,               /* (address or 0, pages, rights): gives the address, or 0 */
    CALL_UNMAP,             /* (address, pages): gives 1, or 0 */
    CALL_PROTECT,           /* (address, pages, rights): gives 1, or 0 */
    CALL_ON_FAULT,          /* (code address): where to go on after a fault, registers unchanged; 0: end the process */
    CALL_PIPE,              /* gives a new pipe */
    CALL_READ,              /* (pipe, address, count): waits for the first byte; gives how many */
    CALL_WRITE,             /* (pipe, address, count): waits until all fits */
    CALL_PRINT,             /* (address, count) */
    CALL_DISK,              /* (1 read or 2 write, sector, address of 512 bytes): gives 0, an error, or -1 without a disk */
    CALL_COMMAND_LINE,      /* (address, size) */
    CALL_NANOBENCH,         /* (which, iterations, empty): a loop inside the kernel */
    CALL_BAD,               /* (which): break the kernel */
    CALL_BEGIN,             /* the kernel's counts start at 0 */
    CALL_END,               /* and are kept as they are now */
    CALL_REPORT,            /* (operations, iterations, checksum) */
};

enum nanobench { NANO_IN, NANO_CR8, NANO_CALLRET, NANO_PGFAULT, NANO_DIVZERO, NANO_PTEMOD, NANO_PTEMOD_P_NP, NANO_PTEMOD_NP_P };
enum bad {
    BAD_STACK_OVERFLOW, BAD_NO_IDT, BAD_RECURSIVE_FAULT, BAD_STRAY_POINTER, BAD_FOREIGN_FRAME, BAD_FOREIGN_TABLE, BAD_FOREIGN_DMA
};

#define RIGHT_READ 1
#define RIGHT_WRITE 2
#define SECTOR 512
