//! What the table of kernels becomes: methods that check, and checked calls for a device to compute.

use super::{AttentionMask, Ragged, RopeLayout, table::kernels};
#[cfg(feature = "capi")]
use crate::device::Device;
use crate::device::{TensorMut, TensorRef};

/// The type of an argument.
macro_rules! argument {
    (read Ragged, $life:lifetime, $device:ty) => { Ragged<$life, $device> };
    (read $type:ident, $life:lifetime, $device:ty) => { TensorRef<$life, $device> };
    (write $type:ident, $life:lifetime, $device:ty) => { TensorMut<$life, $device> };
    (maybe $type:ident, $life:lifetime, $device:ty) => { Option<TensorRef<$life, $device>> };
    (value $type:ident, $life:lifetime, $device:ty) => { $type };
}
pub(super) use argument;

/// Holds an argument against its row.
macro_rules! fit {
    ($fit:ident, $argument:ident: value $type:ident) => {};
    ($fit:ident, $argument:ident: read Ragged [$sequences:ident, $pages:ident]) => {
        $fit.ragged(&$argument, &$sequences, &$pages)?
    };
    ($fit:ident, $argument:ident: $how:ident $type:ident [.. $(, $dim:ident)*]) => {
        $fit.$how(stringify!($argument), &$argument, Pattern { dtype: Type::$type, rest: true, dims: &[$(&$dim),*] })?
    };
    ($fit:ident, $argument:ident: $how:ident $type:ident [$($dim:ident),*]) => {
        $fit.$how(stringify!($argument), &$argument, Pattern { dtype: Type::$type, rest: false, dims: &[$(&$dim),*] })?
    };
}
pub(super) use fit;

/// An argument as another type of device names it.
#[cfg(feature = "capi")]
macro_rules! of_device {
    (value $argument:expr) => {
        $argument
    };
    (maybe $argument:expr) => {
        $argument.map(|tensor| tensor.of_device())
    };
    ($how:ident $argument:expr) => {
        $argument.of_device()
    };
}

/// The methods of [`Kernels`](super::Kernels): each checks its arguments and hands them to the device.
macro_rules! methods {
    ($(
        $(#[$doc:meta])+
        $name:ident $Name:ident [$($dim:ident),*] {
            $($argument:ident: $how:ident $type:ident $([$($shape:tt),*])?,)+
        }
        $(where $holds:expr, $($cause:expr),+;)*
    )+) => { $(
        $(#[$doc])+
        #[allow(non_snake_case, reason = "dimensions are written as in the table")]
        #[allow(clippy::too_many_arguments, reason = "attention has that many")]
        fn $name(&self, stream: &Self::Stream, $($argument: argument!($how $type, '_, Self)),+) -> Result<()> {
            let mut fit = Fit::new(stringify!($name), self, stream);
            $(let $dim = Dim::new(stringify!($dim));)*
            $(fit!(fit, $argument: $how $type $([$($shape),*])?);)+
            $(let $dim = $dim.size();)*
            $(fit.check($holds, || format!($($cause),+))?;)*
            self.compute(stream, Call::$Name(call::$Name { $($argument,)+ $($dim),* }))
        }
    )+ };
}
pub(super) use methods;

/// [`Call`] and its variants.
macro_rules! calls {
    ($(
        $(#[$doc:meta])+
        $name:ident $Name:ident [$($dim:ident),*] {
            $($argument:ident: $how:ident $type:ident $([$($shape:tt),*])?,)+
        }
        $(where $holds:expr, $($cause:expr),+;)*
    )+) => {
        $(
            #[doc = concat!("The arguments of [`Kernels::", stringify!($name), "`](super::Kernels::", stringify!($name), ").")]
            #[non_exhaustive]
            #[allow(non_snake_case, reason = "dimensions are written as in the table")]
            pub struct $Name<'a, D> {
                $(
                    #[doc = concat!("`", stringify!($type $([$($shape),*])?), "`")]
                    pub $argument: argument!($how $type, 'a, D),
                )+
                $(#[doc = "The size of this dimension."] pub $dim: usize,)*
            }
        )+

        /// A kernel with arguments that were found to fit together, which only the methods of [`Kernels`](super::Kernels) make.
        #[non_exhaustive]
        #[allow(clippy::large_enum_variant, reason = "it is not kept, and a box would allocate in every pass")]
        pub enum Call<'a, D> {
            $(
                #[doc = concat!("[`Kernels::", stringify!($name), "`](super::Kernels::", stringify!($name), ")")]
                $Name($Name<'a, D>),
            )+
        }

        impl<'a, D> Call<'a, D> {
            /// The names of all kernels, in the order of the table.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),+];

            /// The kernel's name.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$Name(_) => stringify!($name),)+ }
            }

            /// The same call, by the name of another type of device.
            ///
            /// # Safety
            /// All tensors are in that device's memory.
            #[cfg(feature = "capi")]
            pub(crate) unsafe fn of_device<E: Device>(self) -> Call<'a, E> where D: Device {
                // SAFETY: the caller promises that all tensors are in that device's memory.
                unsafe {
                    match self { $(
                        Self::$Name(call) => Call::$Name($Name {
                            $($argument: of_device!($how call.$argument),)+
                            $($dim: call.$dim),*
                        }),
                    )+ }
                }
            }
        }
    };
}
kernels!(calls);
