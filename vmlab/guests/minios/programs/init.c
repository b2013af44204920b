/* init.c: the first process: runs the workload that the command line names. */
#include "../text.h"
#include "user.h"

static const struct { const char *name; void (*run)(void); } workloads[] = {
    {"syscall", syscall_bench}, {"in", in_bench}, {"cr8", cr8_bench}, {"callret", callret_bench}, {"pgfault", pgfault_bench},
    {"divzero", divzero_bench}, {"ptemod", ptemod_bench}, {"ptemod_p_np", ptemod_p_np_bench}, {"ptemod_np_p", ptemod_np_p_bench},
    {"forkwait", forkwait},
    {"null_call", null_call}, {"fork", fork_bench}, {"ctxsw", ctxsw}, {"mmap", mmap_bench}, {"protfault", protfault},
    {"pagefault", pagefault},
    {"build", build}, {"server", server}, {"chase", chase}, {"compute", compute}, {"mixed", mixed}, {"io", io},
    {"random", random_programs}, {"idle", idle}, {"bad", bad_kernel},
};

static void init(void)
{
    char line[256];
    call(CALL_COMMAND_LINE, (word)line, sizeof line, 0);
    const char *name = find_option(line, "workload=");
    for (word i = 0; name && i < sizeof workloads / sizeof *workloads; i++)
        if (is_word(name, workloads[i].name)) {
            say("minios: workload=%s bits=%u\n", workloads[i].name, (u32)sizeof(word) * 8);
            workloads[i].run();
            exit(0);
        }
    say("minios: unknown workload\n");
    exit(3);
}

void user_main(word program, word argument)
{
    if (program == PROGRAM_COMPILER)
        compiler(argument);
    else
        init();
    exit(0);
}
