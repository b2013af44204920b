/* disk.c: the block device (docs/machine.md): a sector at a time through a page of the kernel's, and an interrupt when
 * it is done. Called by syscall.c; trap.c for the interrupt. When paravirtual, disk_start may become a ring's. */
#include "calls.h"
#include "disk.h"
#include "kernel.h"

#define ID 0xc00                        /* registers of 32 bits */
#define CAPACITY 0xc04
#define FIRST_SECTOR 0xc08
#define COUNT 0xc0c
#define ADDRESS_LOW 0xc10
#define ADDRESS_HIGH 0xc14
#define COMMAND 0xc18                   /* read: STATUS */
#define ACKNOWLEDGE 0xc1c
#define DONE 2

word disk_sectors;
struct disk_request disk_request;
static u8 *buffer;
static int busy;
static struct queue finished, waiting;

void disk_init(void)
{
    buffer = page_new();
    if (in_word(ID) == 0x4b4c4256)
        disk_sectors = in_word(CAPACITY);
}

void disk_start(struct disk_request *request)
{
    out_word(FIRST_SECTOR, request->sector);
    out_word(COUNT, 1);
    out_word(ADDRESS_LOW, request->address);
    out_word(ADDRESS_HIGH, 0);
    out_word(COMMAND, request->command);
}

void disk_interrupt(void)
{
    u32 status = in_word(COMMAND);
    if (!(status & DONE))
        return;
    out_word(ACKNOWLEDGE, 0);
    disk_done(status >> 8 & 0xff);
}

/* The request has ended, with an error code or 0. Interrupts are off. */
void disk_done(u32 error)
{
    disk_request.error = error;
    disk_request.pending = 0;
    wake(&finished);
}

word disk_run(void)
{
    counts.disk_requests++;
    cli();
    disk_request.pending = 1;
    struct disk_request *request = &disk_request;
#ifdef __x86_64__
    asm volatile(SITE(K_DISK, ROOM_CALL, "call disk_start") : "+D"(request) :: "rsi", CALL_CLOBBERS);
#else
    asm volatile(SITE(K_DISK, ROOM_CALL, "call disk_start") : "+a"(request) :: "edx", "ecx", "memory", "cc");
#endif
    while (disk_request.pending)
        wait_on(&finished);
    sti();
    return disk_request.error;
}

word disk_transfer(word command, word sector, u8 *data)
{
    if (!disk_sectors || !space_allows(&current->space, data, SECTOR, command == 1 ? MAY_WRITE : MAY_READ))
        return -1;
    cli();
    while (busy)
        wait_on(&waiting);
    busy = 1;
    sti();
    if (command == 2)
        copy(buffer, data, SECTOR);
    disk_request.command = command;
    disk_request.sector = sector;
    disk_request.address = (word)buffer;
    word error = disk_run();
    if (command == 1 && !error)
        copy(data, buffer, SECTOR);
    busy = 0;
    wake(&waiting);
    return error;
}
