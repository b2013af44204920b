/* macro.c: loads like whole programs: processes, faults, system calls, switches and computing in fixed mixtures. */
#include "../text.h"
#include "user.h"

/* Computing: a small hash over and over, nothing but registers and one cache line. */
static u32 work(u32 seed, u32 rounds)
{
    u32 sum = seed | 1, table[8];
    for (u32 i = 0; i < 8; i++)
        table[i] = next_random(&sum);
    for (u32 i = 0; i < rounds; i++) {
        sum = mix(sum, table[i % 8]) * 0x9e3779b1;
        table[i % 8] += sum;
    }
    return sum;
}

void compute(void)
{
    u32 iterations = option("iterations=", 100), sum = 1;
    begin();
    for (u32 i = 0; i < iterations; i++)
        sum = mix(sum, work(i, 5000));
    end(iterations, iterations, sum);
}

/* One compilation: fresh memory filled, much computing, a source sector read and an object sector written if there is a disk. */
void compiler(word unit)
{
    u32 pages = option("pages=", 64), sum = unit;
    u32 data[SECTOR / 4];
    word at = map(0, pages, READ_WRITE);
    for (u32 i = 0; i < SECTOR / 4; i++)
        data[i] = 0;
    call(CALL_DISK, 1, unit % 16, (word)data);
    sum = mix(sum, data[0]);
    for (word page = 0; page < pages; page++) {
        *(volatile u32 *)(at + page * PAGE) = sum = mix(sum, work(page, 100));
        if (page % 16 == 15)
            protect(at + (page - 15) * PAGE, 16, RIGHT_READ);
    }
    for (word page = 0; page < pages; page++)
        sum = mix(sum, *(volatile u32 *)(at + page * PAGE));
    data[0] = sum;
    call(CALL_DISK, 2, 16 + unit % 16, (word)data);
    unmap(at, pages);
    exit(sum);
}

/* make -j `processes`: every unit is a fork, an exec, a compilation and a wait. Sixteen units make a library, which all
 * must be finished for: so that no two at work write the same sector. */
void build(void)
{
    u32 iterations = option("iterations=", 16), jobs = option("processes=", 2), running = 0, sum = 0;
    pages_new(option("pages=", 64));
    begin();
    for (u32 unit = 0; unit < iterations; unit++) {
        while (running == jobs || (unit % 16 == 0 && running))
            sum += wait(), running--;
        if (!fork())
            call(CALL_EXEC, PROGRAM_COMPILER, unit, 0);
        running++;
    }
    while (running--)
        sum += wait();                  /* in whatever order they end */
    end(iterations, iterations, sum);
}

/* `processes` servers answer requests that come through pipes: short system calls, a little computing, many switches;
 * every eighth request reads the disk if there is one. */
void server(void)
{
    u32 iterations = option("iterations=", 200), servers = option("processes=", 4), sum = 0;
    word requests[16], answers[16];
    if (servers > 15)
        fail("at most 15 servers");
    for (u32 i = 0; i < servers; i++)
        requests[i] = pipe(), answers[i] = pipe();
    begin();
    for (u32 i = 0; i < servers; i++)
        if (!fork())
            for (u32 request, data[SECTOR / 4];;) {
                if (!read_all(requests[i], &request, sizeof request) || !request)
                    exit(0);
                data[0] = request;
                if (request % 8 == 0)
                    call(CALL_DISK, 1, request / 8 % 16, (word)data);
                call(CALL_NULL, 0, 0, 0);
                data[0] = mix(data[0], work(request, 60));
                write_all(answers[i], data, 4);
            }
    for (u32 i = 0; i < iterations; i += servers) {
        u32 count = iterations - i < servers ? iterations - i : servers, answer, request;
        for (u32 j = 0; j < count; j++) {
            request = i + j + 1;
            write_all(requests[j], &request, sizeof request);
        }
        for (u32 j = 0; j < count; j++) {
            read_all(answers[j], &answer, sizeof answer);
            sum = mix(sum, answer);
        }
    }
    for (u32 i = 0, stop = 0; i < servers; i++)
        write_all(requests[i], &stop, sizeof stop);
    for (u32 i = 0; i < servers; i++)
        wait();
    end(iterations, iterations, sum);
}

/* A walk along pointers through `pages` pages in random order, 64 steps an iteration: the page table stands still. */
void chase(void)
{
    u32 iterations = option("iterations=", 1000), pages = option("pages=", 256), state = option("seed=", 1) | 1, sum = 0;
    word at = pages_new(pages);
    for (u32 page = 0; page < pages; page++)
        *(word *)(at + page * PAGE) = page;
    for (u32 left = pages - 1; left; left--) {      /* one cycle through all (Sattolo) */
        u32 other = next_random(&state) % left;
        word *a = (word *)(at + left * PAGE), *b = (word *)(at + other * PAGE), keep = *a;
        *a = *b;
        *b = keep;
    }
    for (u32 page = 0; page < pages; page++) {
        word *a = (word *)(at + page * PAGE);
        *a = at + *a * PAGE;
    }
    begin();
    for (u32 i = 0; i < iterations; i++) {
        for (u32 j = 0; j < 64; j++)
            at = *(volatile word *)at;
        sum = mix(sum, (at - USER) / PAGE);
    }
    end(iterations * 64, iterations, sum);
}

/* A little of everything: a system call each way, a fault, a fork, a mapping, a switch, computing. */
void mixed(void)
{
    u32 iterations = option("iterations=", 20), pages = option("pages=", 32), sum = 0, value;
    word there = pipe(), back = pipe(), mine = pages_new(pages);
    begin();
    for (u32 i = 0; i < iterations; i++) {
        if (!fork()) {
            read_all(there, &value, sizeof value);
            *(volatile u32 *)(mine + i % pages * PAGE) += value;
            value = *(volatile u32 *)(mine + i % pages * PAGE);
            write_all(back, &value, sizeof value);
            exit(value);
        }
        fast_call(CALL_NULL);
        word at = map(0, 8, READ_WRITE);
        for (u32 j = 0; j < 8; j++)
            *(volatile u32 *)(at + j * PAGE) = i * j;
        protect(at, 4, RIGHT_READ);
        write_all(there, &i, sizeof i);
        sum = mix(sum, work(i, 2000));
        read_all(back, &value, sizeof value);
        for (u32 j = 0; j < 8; j++)
            sum = mix(sum, *(volatile u32 *)(at + j * PAGE));
        unmap(at, 8);
        sum = mix(sum, value + wait());
        call(CALL_DISK, 1, i % 16, (word)&(u32[SECTOR / 4]){0});
    }
    end(iterations, iterations, sum);
}

/* Sectors written, read back and compared, in an order that moves about. */
void io(void)
{
    u32 iterations = option("iterations=", 50), sum = 0;
    u32 data[SECTOR / 4], again[SECTOR / 4];
    if (call(CALL_DISK, 1, 0, (word)data))
        fail("no disk, or its first sector cannot be read");
    begin();
    for (u32 i = 0; i < iterations; i++) {
        u32 sector = i * 7 % 32;
        for (u32 j = 0; j < SECTOR / 4; j++)
            data[j] = i * j + sector;
        if (call(CALL_DISK, 2, sector, (word)data) || call(CALL_DISK, 1, sector, (word)again))
            fail("the disk refused a sector");
        for (u32 j = 0; j < SECTOR / 4; j++)
            sum = mix(sum, again[j]);
    }
    end(2 * iterations, iterations, sum);
}

/* Nothing to do until the timer ticks. Then, not counted, one tick that must come while the program is running: where
 * IRET or POPF drops the interrupt flag without a word, it never does. */
void idle(void)
{
    u32 iterations = option("iterations=", 10), period = option("timer=", 0);
    if (!period)
        fail("idle needs a timer");
    begin();
    for (u32 i = 0; i < iterations; i++)
        call(CALL_SLEEP, 1, 0, 0);
    end(iterations, iterations, 0);
    word start = call(CALL_TICKS, 0, 0, 0);
    for (u32 patience = period / 500 + 100; call(CALL_TICKS, 0, 0, 0) == start; patience--) {
        if (!patience)
            fail("no tick came while a program was running");
        work(patience, 100);            /* more than 500 instructions */
    }
}

/* The kernel breaks itself, or reaches for what is not its own; whoever comes back tells what it got. */
void bad_kernel(void)
{
    static const char *const names[] = {
        "stack-overflow", "no-idt", "recursive-fault", "stray-pointer", "foreign-frame", "foreign-table", "foreign-dma",
    };
    char line[256];
    call(CALL_COMMAND_LINE, (word)line, sizeof line, 0);
    const char *name = find_option(line, "bad=");
    for (u32 i = 0; name && i < sizeof names / sizeof *names; i++)
        if (is_word(name, names[i]))
            say("minios: %s gave %x\n", names[i], (u32)call(CALL_BAD, i, 0, 0));
    fail("the kernel survived");
}
