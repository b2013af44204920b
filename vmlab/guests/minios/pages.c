/* pages.c: which frames of memory are free, and how many hold each. Called by space.c and process.c.
 *
 * Free frames are a list, linked by their first words; frames that were never used yet come behind `memory_start`. */
#include "kernel.h"

static u16 holders[MAX_MEMORY / PAGE];
static word free_list;

void pages_init(void)
{
    memory_start = (memory_start + PAGE - 1) & ~(word)(PAGE - 1);
    for (word page = 0; page < memory_start; page += PAGE)
        holders[page / PAGE] = 1;       /* the image, never given away */
}

void *page_new(void)
{
    word page = free_list;
    if (page) {
        free_list = *(word *)page;
    } else {
        page = memory_start;
        if (page >= memory_end) {
            print("minios: out of memory\n");
            shut_down(4);
        }
        memory_start += PAGE;
    }
    holders[page / PAGE] = 1;
    return (void *)page;
}

void page_hold(word page) { holders[page / PAGE]++; }
word page_holders(word page) { return holders[page / PAGE]; }

/* The page is free from here on. The caller stores the result in its first word: how, depends on what the page was. */
word page_free(void *page)
{
    word link = free_list;
    holders[(word)page / PAGE] = 0;
    free_list = (word)page;
    return link;
}

void page_drop(word page)
{
    if (holders[page / PAGE] > 1)
        holders[page / PAGE]--;
    else
        *(word *)page = page_free((void *)page);
}

void clear(void *page, word bytes)
{
    word count = bytes / 4;
    asm volatile("rep stosl" : "+D"(page), "+c"(count) : "a"(0) : "memory");
}

void page_copy(void *to, const void *from)
{
    word count = PAGE / 4;
    asm volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(count) :: "memory");
}

void copy(void *to, const void *from, word count)
{
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) :: "memory");
}
