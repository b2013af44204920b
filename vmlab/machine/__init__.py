"""The physical PC: an x86 CPU (Unicorn) with the parts that Unicorn leaves out put back.

Read in this order: :mod:`pc` (the list of parts), :mod:`cpu` and :mod:`state` (the CPU's visible and
hidden state), :mod:`decode` and :mod:`counter` (what a block holds, what was retired),
:mod:`delivery` (interrupts through IDT and TSS), :mod:`svm` (AMD-V), then the devices.
"""
