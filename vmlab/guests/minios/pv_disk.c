/* pv_disk.c: the block device by a ring of requests in a page that we share with the hypervisor (option `disk=ring`),
 * or by its ports (`disk=port`). Called by disk.c in place of disk_start, and by pv.c when there is an answer.
 * The page is laid out as in xen/include/public/io/ring.h, requests as in io/blkif.h. */
#include "disk.h"
#include "kernel.h"
#include "pv.h"
#include "text.h"

#define READ 0
#define WRITE 1
#define ENTRIES 32

struct request {
    u8 operation, segments;
    u16 handle;
#ifdef __x86_64__
    u32 unused;                         /* 64-bit numbers are aligned to 8 */
#endif
    u32 id[2], sector[2];
    struct { u32 frame; u8 first, last; u16 unused; } segment[11];
};
struct response { u32 id[2]; u8 operation, unused; short status; };
static struct {
    volatile u32 request_made, request_event, response_made, response_event;
    u8 unused[48];
    union { struct request request; struct response response; } entries[ENTRIES];
} *ring;
static u32 ring_port, made, seen;

static void connect(void)
{
    u32 answer[2];
    ring = page_new();
    clear(ring, PAGE);
    ring->request_event = ring->response_event = 1;
    pv_must(hypercall(HYPERCALL_RING_OP, 0, machine((word)ring) / PAGE, (word)answer, 0, 0));
    ring_port = answer[0];
}

void pv_disk_start(struct disk_request *request)
{
    static int by_port = -1;
    if (by_port < 0) {
        const char *how = find_option(command_line, "disk=");
        by_port = by_hypercall || (how && is_word(how, "port"));
    }
    if (by_port) {
        disk_start(request);
        return;
    }
    if (!ring)
        connect();
    struct request *r = &ring->entries[made % ENTRIES].request;
    r->operation = request->command == 2 ? WRITE : READ;
    r->segments = 1;
    r->handle = 0;
    r->id[0] = made;
    r->sector[0] = request->sector;
    r->id[1] = r->sector[1] = 0;
    r->segment[0].frame = machine(request->address) / PAGE;
    r->segment[0].first = r->segment[0].last = request->address % PAGE / 512;
    u32 old = made++;
    ring->request_made = made;
    if (made - ring->request_event < made - old)        /* ring.h: whether the other side wants to be told of this one */
        pv_must(hypercall(HYPERCALL_EVENT_CHANNEL_OP, EVTCHNOP_SEND, (word)&ring_port, 0, 0, 0));
}

void pv_disk_event(u32 port)
{
    if (port != ring_port)
        return;
    do {
        while (seen != ring->response_made) {
            struct response *r = &ring->entries[seen++ % ENTRIES].response;
            disk_done(r->status ? 1 : 0);
        }
        ring->response_event = seen + 1;
    } while (seen != ring->response_made);
}
