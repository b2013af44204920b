/* random.c: seeded random programs of fork, map, unmap, protect, write and read. Each prints a checksum that depends on
 * what is in memory and on which accesses faulted, and on nothing else. */
#include "user.h"

#define WINDOW_SIZE 48              /* pages, half of them below and half above where one level-1 table follows another */
#define WINDOW ((word)USER + 0x400000 - WINDOW_SIZE / 2 * PAGE)

static u32 steps(u32 seed, u32 count, u32 depth)
{
    u32 state = seed * 2654435761u | 1, sum = seed;
    for (u32 i = 0; i < count; i++) {
        u32 dice = next_random(&state) % 16, first = next_random(&state) % WINDOW_SIZE;
        u32 pages = next_random(&state) % 8 + 1, value = next_random(&state);
        word at = WINDOW + first * PAGE;
        volatile u32 *word_at = (volatile u32 *)(at + value % 1024 * 4);
        if (pages > WINDOW_SIZE - first)
            pages = WINDOW_SIZE - first;
        if (dice < 3)
            sum = mix(sum, map(at, pages, value & 1 ? READ_WRITE : RIGHT_READ) != 0);
        else if (dice == 3)
            sum = mix(sum, unmap(at, pages));
        else if (dice == 4)
            sum = mix(sum, protect(at, pages, value & 1 ? READ_WRITE : RIGHT_READ));
        else if (dice < 10)
            sum = mix(sum, try_write(word_at, value ^ sum));
        else if (dice < 15) {
            u32 seen = 0;
            sum = mix(sum, try_read(word_at, &seen));
            sum = mix(sum, seen);
        } else if (depth) {
            word child = fork();
            if (!child)
                exit(steps(state, count / 2, depth - 1));
            u32 own = steps(state ^ 0x5555, count / 4, 0);      /* at the same time as the child */
            sum = mix(mix(sum, own), wait());
        }
    }
    for (u32 page = 0; page < WINDOW_SIZE; page++) {            /* all that is there */
        u32 seen = 0;
        sum = mix(sum, try_read((volatile u32 *)(WINDOW + page * PAGE + page * 4), &seen));
        sum = mix(sum, seen);
    }
    return sum;
}

void random_programs(void)
{
    u32 seed = option("seed=", 1), seeds = option("seeds=", 20), count = option("iterations=", 60), all = 0;
    call(CALL_ON_FAULT, (word)fault_return, 0, 0);
    begin();
    for (u32 i = 0; i < seeds; i++) {
        if (!fork())
            exit(steps(seed + i, count, 2));
        u32 sum = wait();
        say("minios: seed %u checksum %x\n", seed + i, sum);
        all = mix(all, sum);
    }
    end(seeds, count, all);
}
