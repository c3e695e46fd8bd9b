"""The production kernel on a CPU: the same source, compiled by a host compiler, under schedules that a GPU shows once a year.

``native/*.cuh`` reaches the machine through ``native/ptx.cuh`` alone. Here is another ``ptx.cuh`` with the same interface, behind which
stands an emulated machine. Every launch draws its schedule from a seed, is held to the specification's bits, and fails with a
``ProtocolViolation`` that names the check, the line of the kernel, the thread, the place in shared memory and the barrier's state. The
seed is in the message; the same seed replays the same schedule on every host.

    pytest tests/emulator                              # a thousand schedules
    pytest tests/emulator --emulator-schedules 50000

What is modelled
    - The threads of a cluster (in the kernel without clusters: of a CTA) as fibers, interrupted before any primitive; the scheduler's
      temper (how often it interrupts, how late copies land, how unfair it is to some warps) is drawn too. Clusters run one after the
      other: they share nothing but the grid.
    - Shared memory of each CTA, word by word: who wrote it last, who has read it since, what is on its way to it.
    - mbarriers: phases, arrivals, transaction bytes (below zero too, when bytes land before they are expected), parity waits that a
      slow thread can miss.
    - Bulk copies, in pieces, from either end; stores and arrivals at other CTAs. Each lands at some later moment, in any order, but for
      the arrivals of one thread, which keep theirs because each releases what came before.
    - What is known to have happened before what (vector clocks): an access that is ordered by luck fails under every schedule. Waits
      acquire what their scope covers; the cluster barrier's relaxed arrival releases fenced initialisations only; shuffles, nothing.
    - Warps that meet in shuffles, syncwarp, CTA and cluster barriers; CTAs that start and leave at different times.
    - Dependent launch: earlier grids end at some later moment, or, to see what is prefetched, when nothing else can happen.

What is not
    - Time, caches, bank conflicts, registers: nothing here says how fast the kernel is.
    - Orders weaker than "each access takes effect at once, or at one later moment": values are never torn or seen by some threads only.
      That an order was asked for is checked by the clocks; proxies (generic and asynchronous accesses to one place) are not told apart.
    - Whether the compiler keeps the lanes of a warp together where nothing demands it. Here they never do.

The checks, each of which ``test_faults.py`` sees fail when the kernels are changed in one place. Operators make the changes
(``mutants.py``), and hands those that no operator makes (``faults.py``). What survives is listed with the reason (``survivors.py``).
    deadlock                  nobody can run, and nothing is on its way
    missing bytes             the same, and a phase has got only a part of its bytes; or a CTA leaves with a phase in that state
    surplus bytes             a barrier gets more bytes than its phase expects, or completes it with bytes on their way
    surplus arrival           a barrier gets more arrivals than it was initialised for
    barrier not initialised   used as a barrier without being one
    barrier not visible       its initialisation has not been handed on to the thread, or not been fenced for copies and other CTAs
    barrier overwritten, barrier read     data access to a barrier
    unfilled read             of shared memory that a copy or store is still on its way to
    unwritten read            of shared memory that nobody wrote
    unordered read            of shared memory whose writing the thread has not waited for, or not with the scope that it takes
    overwrite                 of shared memory that somebody may still be reading, or that another write goes to
    absent CTA                access to a CTA that has left, or that is not known to have started
    early exit                a CTA leaves while something is on its way to it
    cluster barrier           arrivals and waits of a thread do not alternate, or it leaves in between; or one CTA is all there is
    CTA barrier               a thread leaves without coming to a barrier that others of its CTA come to
    absent lane, divergence   a warp meets without some of its lanes, or its lanes in different places
    out of bounds, misaligned
    early read, early write   of global memory, before the thread has waited for earlier grids; the weight, unless it may be prefetched
    early dependents          started by a thread that has not waited for earlier grids
    write to an input, read of the output, second write
"""
