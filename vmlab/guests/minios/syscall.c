/* syscall.c: the system calls, by number (calls.h). Called by trap.c with interrupts on. */
#include "calls.h"
#include "kernel.h"

static word print_text(const char *text, word count)
{
    char line[65];
    if (!space_allows(&current->space, text, count, MAY_READ))
        return -1;
    while (count) {
        word part = count < 64 ? count : 64;
        copy(line, text, part);
        line[part] = 0;
        print("%s", line);
        text += part;
        count -= part;
    }
    return 0;
}

static word copy_command_line(char *to, word size)
{
    const char *from = command_line;
    if (!space_allows(&current->space, to, size, MAY_WRITE))
        return -1;
    while (size-- > 1 && *from)
        *to++ = *from++;
    *to = 0;
    return 0;
}

word system_call(struct frame *frame)
{
    word a = frame->ARGUMENT_1, b = frame->ARGUMENT_2, c = frame->ARGUMENT_3;
    switch ((enum call)frame->ax) {
    case CALL_NULL: return current->id;
    case CALL_EXIT: process_exit(a);
    case CALL_FORK: return process_fork(frame);
    case CALL_WAIT: return process_wait();
    case CALL_EXEC: process_exec(frame, a, b); return frame->ax;
    case CALL_YIELD: cli(); yield(); sti(); return 0;
    case CALL_SLEEP: sleep(a); return 0;
    case CALL_TICKS: return ticks;
    case CALL_MAP: return space_map(&current->space, a, b, c);
    case CALL_UNMAP: return space_unmap(&current->space, a, b);
    case CALL_PROTECT: return space_protect(&current->space, a, b, c);
    case CALL_ON_FAULT: current->on_fault = a; return 0;
    case CALL_PIPE: return pipe_new();
    case CALL_READ: return pipe_read(a, (u8 *)b, c);
    case CALL_WRITE: return pipe_write(a, (const u8 *)b, c);
    case CALL_PRINT: return print_text((const char *)a, b);
    case CALL_DISK: return disk_transfer(a, b, (u8 *)c);
    case CALL_COMMAND_LINE: return copy_command_line((char *)a, b);
    case CALL_NANOBENCH: return nanobench(a, b, c);
    case CALL_BAD: return bad(a);
    case CALL_BEGIN: outcome_begin(); return 0;
    case CALL_END: outcome_end(); return 0;
    case CALL_REPORT: outcome_report(a, b, c); return 0;
    }
    return -1;
}
