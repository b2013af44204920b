# pv.S: the paravirtual kernel: the ELF notes that it is found by, and the pages that it shares with its hypervisor. Then,
# by width, its entry and all of its other assembly. Facts: xen/include/public/elfnote.h. "Numeric types are either 4 or
# 8 bytes": 8 say that the kernel has 64 bits, which the file, an ELF32 for Multiboot's sake, does not.
#include "types.h"
#include "sites.h"
#include "pv.h"

#ifdef __x86_64__
#define NUMBER .quad
#else
#define NUMBER .long
#endif
    .section .note.Xen, "a", @note
.macro NOTE type, desc:vararg
    .balign 4
    .long 4, 7750f - 7740f, \type
    .asciz "Xen"
7740:
    \desc
7750:
    .balign 4
.endm
    NOTE 6, .asciz "minios"         # GUEST_OS
    NOTE 5, .asciz "xen-3.0"        # XEN_VERSION
    NOTE 8, .asciz "generic"        # LOADER
#ifndef __x86_64__
    NOTE 9, .asciz "yes"            # PAE_MODE: of 32 bits only
#endif
    NOTE 10, .asciz ""              # FEATURES: none needed
    NOTE 3, NUMBER 0                # VIRT_BASE
    NOTE 4, NUMBER 0                # PADDR_OFFSET
    NOTE 1, NUMBER pv_start         # ENTRY
    NOTE 2, NUMBER hypercall_page   # HYPERCALL_PAGE

    .section .hypercall, "ax"
    .balign 4096
    .globl hypercall_page
hypercall_page:                 # the hypervisor fills it
    .fill 4096, 1, 0xcc

    .bss
    .balign 4096
    .globl shared_info
shared_info:                    # the hypervisor's page is mapped over this one
    .skip 4096

#ifdef __x86_64__
#include "pv64.inc"
#else
#include "pv32.inc"
#endif
