"""What several VMMs share: the virtual CPU, instruction emulation, VMM-owned memory, virtual devices."""
