//! The one place that promises the kernel's view of a struct to `aya`.

/// Marks shared structs as plain data for `aya` and fixes their size.
///
/// `bytemuck::Pod`, which the struct must derive, proves that it has no padding and that every bit
/// pattern is valid; the size is asserted so that a change of layout cannot pass unseen.
macro_rules! shared {
    ($($name:ty = $size:literal),+ $(,)?) => {
        $(
            const _: () = assert!(core::mem::size_of::<$name>() == $size);
            const _: fn() = || {
                fn is_pod<T: bytemuck::Pod>() {}
                is_pod::<$name>();
            };
            // SAFETY: `bytemuck::Pod` is proven above: `repr(C)`, no padding, any bit pattern valid.
            #[cfg(feature = "user")]
            unsafe impl aya::Pod for $name {}
        )+
    };
}

pub(crate) use shared;
