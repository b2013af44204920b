"""``nano``: the lab's own 32-bit kernel. Its sources, the built image and its lock file lie beside this file.

One image, two entries: Multiboot 1 on bare hardware, Xen-style ELF notes when paravirtual. The sources are
read in the order boot.S (native entry and main), workloads.S, recipes.S, generate.S,
paravirt.S, console.S.
"""
