/* disk.h: one request to the block device, for disk.c and for whoever takes its place when paravirtual. */
#pragma once
#include "types.h"

struct disk_request {
    u32 command, sector, address;       /* 1 read, 2 write; guest-physical address of 512 bytes */
    volatile u32 pending, error;
};
extern struct disk_request disk_request;
extern word disk_sectors;               /* 0: there is no disk */
void disk_start(struct disk_request *request);
word disk_run(void);                    /* carries out disk_request and waits for it; gives its error */
void disk_done(u32 error);
