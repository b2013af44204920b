/* pipe.c: bytes from one process to another. Called by syscall.c. Pipes are never given back: a run makes a few. */
#include "kernel.h"

#define SIZE 512
static struct pipe {
    u8 data[SIZE];
    u32 read, written;                  /* bytes so far */
    struct queue readers, writers;
} pipes[PROCESSES + 1];
static word used;

word pipe_new(void) { return used <= PROCESSES ? used++ : (word)-1; }

word pipe_read(word number, u8 *to, word count)
{
    struct pipe *pipe = pipes + number;
    word done = 0;
    if (number >= used || !space_allows(&current->space, to, count, MAY_WRITE))
        return -1;
    while (pipe->read == pipe->written) {
        cli();
        wait_on(&pipe->readers);
        sti();
    }
    for (; done < count && pipe->read != pipe->written; done++)
        to[done] = pipe->data[pipe->read++ % SIZE];
    wake(&pipe->writers);
    return done;
}

word pipe_write(word number, const u8 *from, word count)
{
    struct pipe *pipe = pipes + number;
    if (number >= used || !space_allows(&current->space, from, count, MAY_READ))
        return -1;
    for (word done = 0; done < count; wake(&pipe->readers)) {
        while (pipe->written - pipe->read == SIZE) {
            cli();
            wait_on(&pipe->writers);
            sti();
        }
        for (; done < count && pipe->written - pipe->read < SIZE; done++)
            pipe->data[pipe->written++ % SIZE] = from[done];
    }
    return count;
}
