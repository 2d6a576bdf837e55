//! What the modules share: open values, layout assertions, short `Debug` for pages that are mostly reserved.

/// Declares an open value: a newtype over its wire representation whose known codes are constants with a name and
/// whose unknown codes are kept as they are. `mask` is the width of the field it is stored in.
macro_rules! open_value {
    ($(#[$meta:meta])* $name:ident($repr:ty) mask $mask:literal {
        $($value:literal $konst:ident $text:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, zerocopy::FromBytes, zerocopy::IntoBytes,
            zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            $(
                #[doc = concat!($text, " (`", stringify!($value), "`).")]
                pub const $konst: Self = Self($value);
            )*

            /// The value as read from its field; codes without a name are kept.
            pub const fn from_bits(bits: $repr) -> Self {
                Self(bits & $mask)
            }

            /// The value as written to its field, cut to the field's width.
            pub const fn into_bits(self) -> $repr {
                self.0 & $mask
            }

            /// The specification's name, or `None` for a reserved, vendor or newer code.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "unknown {:02X}h", self.0),
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => write!(f, "{name} ({:02X}h)", self.0),
                    None => write!(f, "{:02X}h", self.0),
                }
            }
        }
    };
}

/// Asserts a structure's size, and the offset of each listed field, at compile time.
macro_rules! layout {
    ($name:ty, $size:expr $(, $field:ident @ $offset:expr)* $(,)?) => {
        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size);
            $(assert!(core::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}

/// An all-zero `Default`, for pages whose arrays are too long for the derive.
macro_rules! zeroed_default {
    ($($name:ty),* $(,)?) => {
        $(impl Default for $name {
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        })*
    };
}

/// A `Debug` that shows the listed fields and leaves the reserved rest out.
macro_rules! debug_fields {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_struct(stringify!($name))
                    $(.field(stringify!($field), &self.$field))*
                    .finish_non_exhaustive()
            }
        }
    };
}
