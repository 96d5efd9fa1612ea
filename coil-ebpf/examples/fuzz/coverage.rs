//! Which edges of the code a run has taken.
//!
//! Built with the flags that `cargo xtask fuzz` passes, every edge increments a byte of its own; LLVM's
//! instrumentation says at start where those bytes are. Built without them there are none, and nothing
//! guides the fuzzer.

use std::sync::Mutex;

/// Regions of counters: first address and length.
static REGIONS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Called before `main` for each region, by code that the instrumentation adds.
// SAFETY: nobody else defines a function of this name: it belongs to whoever uses the instrumentation.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    let (start, stop) = (start.addr(), stop.addr());
    if let Ok(mut regions) = REGIONS.lock()
        && start < stop
        && !regions.contains(&(start, stop - start))
    {
        regions.push((start, stop - start));
    }
}

/// The code is instrumented.
pub fn is_there() -> bool {
    REGIONS.lock().is_ok_and(|regions| !regions.is_empty())
}

/// Which class a number of times falls into, one bit for each.
const fn class(times: u8) -> u8 {
    match times {
        0 => 0,
        1 => 1,
        2 => 2,
        3 => 4,
        4..=7 => 8,
        8..=15 => 16,
        16..=31 => 32,
        32..=127 => 64,
        _ => 128,
    }
}

/// Calls `each` with the number and class of every edge that was taken since the last time, and forgets them.
pub fn take(mut each: impl FnMut(usize, u8)) {
    let Ok(regions) = REGIONS.lock() else { return };
    let mut index = 0;
    for (start, length) in regions.iter() {
        for address in *start..start + length {
            let counter = std::ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: a counter of a region that the instrumentation has named, which lives as long as the
            // process; there is one thread.
            let times = unsafe { counter.replace(0) };
            if times != 0 {
                each(index, class(times));
            }
            index += 1;
        }
    }
}
