//! What the allocator of the C library keeps of memory that has been given back: as little as may be.
//!
//! Reading the eBPF object takes some fifty MiB for a moment, on a thread of its own. Left alone the allocator keeps
//! them for that thread's next use, which never comes, and the same for each thread that ever had much.

/// Blocks of this many bytes and more are the kernel's business.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 256 * 1024;
/// As much may be kept at the end of a pool, so that it is not given back and asked for again with each call.
#[cfg(target_env = "gnu")]
const SPARE: libc::c_int = 2 * 1024 * 1024;

/// Makes the allocator frugal. To be called before there are other threads.
pub fn be_frugal() {
    #[cfg(target_env = "gnu")]
    {
        // Threads share four pools; the thresholds no longer grow with what was freed last.
        let settings =
            [(libc::M_ARENA_MAX, 4), (libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, SPARE)];
        for (what, value) in settings {
            // SAFETY: no pointer is passed, and what it changes is a number of the allocator.
            if unsafe { libc::mallopt(what, value) } == 0 {
                eprintln!("the allocator does not take setting {what}");
            }
        }
    }
}

/// Gives what is free back to the kernel; after something that takes much memory for a moment.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no pointer is passed, and blocks that are in use stay where they are.
    let trimmed = unsafe { libc::malloc_trim(0) };
    #[cfg(target_env = "gnu")]
    tracing::debug!(trimmed = trimmed != 0, "memory that is free was given back");
}
