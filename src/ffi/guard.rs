// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guards for C: each runs on a thread of its own. The header is the same without the feature.

#[cfg(feature = "guard")]
pub(super) use with::{Guard, start};
#[cfg(not(feature = "guard"))]
pub(super) use without::{Guard, start};

#[cfg(feature = "guard")]
mod with {
    use std::sync::Arc;

    use crate::backend::Backend;
    use crate::error::Result;
    use crate::vm::Vm;

    /// A running guard.
    pub(in crate::ffi) type Guard = crate::guard::GuardThread;

    /// Starts one.
    ///
    /// # Safety
    /// That of `Vm::guard`.
    pub(in crate::ffi) unsafe fn start(
        vm: &Arc<Vm>,
        backend: &Arc<Backend>,
        address: usize,
    ) -> Result<Guard> {
        // SAFETY: the caller's promise.
        unsafe { vm.guard(backend, address) }?.spawn()
    }
}

#[cfg(not(feature = "guard"))]
mod without {
    use std::sync::Arc;

    use crate::backend::Backend;
    use crate::error::{Error, Result};
    use crate::vm::Vm;

    /// There is none.
    #[derive(Debug)]
    pub(in crate::ffi) enum Guard {}

    /// Refuses.
    ///
    /// # Safety
    /// Any arguments will do.
    pub(in crate::ffi) unsafe fn start(
        _: &Arc<Vm>,
        backend: &Arc<Backend>,
        _: usize,
    ) -> Result<Guard> {
        Err(Error::Unsupported {
            wanted: format!("a guard for backend '{}'", backend.config().name),
            found: "this library was built without its feature `guard`".into(),
        })
    }
    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::backend::BackendConfig;
        use crate::listener::Listener;
        use crate::owner::SoftwareOwner;

        struct Nobody;

        impl Listener for Nobody {}

        #[test]
        fn a_guard_is_refused_with_the_reason() {
            let owner = Arc::new(SoftwareOwner::default());
            let vm = Arc::new(Vm::new(owner, Box::new(Nobody)));
            let backend = vm.create_backend(BackendConfig::new("ram", 4096)).unwrap();
            // SAFETY: any arguments will do.
            let error = unsafe { start(&vm, &backend, 0) }.unwrap_err();
            assert!(error.to_string().contains("feature `guard`"), "{error}");
            assert_eq!(error.errno(), 95, "EOPNOTSUPP");
        }
    }
}
