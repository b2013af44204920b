/* main.c: the kernel from its beginning to its first process. Called by start32.S, start64.S or the paravirtual entry. */
#include "kernel.h"

extern u8 image_end[];
word memory_end, memory_start = (word)image_end;
const char *command_line = "";

void main(void)
{
    options_init();         /* keep the command line */
    pages_init();           /* which memory is free */
    stacks_init();          /* a kernel stack for every process, with a hole below it */
    disk_init();            /* is there one? */
    process_first();        /* process 1, which is to run programs/init.c */
    timer_init();           /* from here on somebody else may get the CPU */
    schedule();             /* never comes back: this was no process */
}
