//! The threads a check works with: rayon's where the feature `parallel` is on, else the caller's alone.

pub(crate) use available::Threads;

#[cfg(feature = "parallel")]
mod available {
    use rayon::{ThreadBuilder, ThreadPool, ThreadPoolBuilder};

    /// Threads at hand; without a pool, the caller's own.
    #[derive(Clone, Copy)]
    pub(crate) struct Threads<'a>(Option<&'a ThreadPool>);

    impl Threads<'_> {
        /// Runs `work` with `wanted` threads at hand (0: one for each core), and waits until they have ended. `None` if they
        /// can't be started.
        pub(crate) fn start<T>(wanted: usize, work: impl FnOnce(Threads<'_>) -> T) -> Option<T> {
            if wanted == 1 {
                return Some(work(Threads(None)));
            }
            ThreadPoolBuilder::new()
                .num_threads(wanted)
                .build_scoped(ThreadBuilder::run, |pool| work(Threads(Some(pool))))
                .ok()
        }

        pub(crate) fn count(self) -> usize {
            self.0.map_or(1, ThreadPool::current_num_threads)
        }

        /// Runs `work` once on each thread, and gives all results.
        pub(crate) fn each<T: Send>(self, work: impl Fn() -> T + Sync) -> Vec<T> {
            match self.0 {
                Some(pool) => pool.broadcast(|_| work()),
                None => vec![work()],
            }
        }
    }
}

#[cfg(not(feature = "parallel"))]
mod available {
    use std::marker::PhantomData;

    /// The caller's thread.
    #[derive(Clone, Copy)]
    pub(crate) struct Threads<'a>(PhantomData<&'a ()>);

    #[expect(
        clippy::unnecessary_wraps,
        clippy::unused_self,
        reason = "the same to its callers as a pool of threads"
    )]
    impl Threads<'_> {
        /// Runs `work`, however many threads are wanted.
        pub(crate) fn start<T>(_wanted: usize, work: impl FnOnce(Threads<'_>) -> T) -> Option<T> {
            Some(work(Threads(PhantomData)))
        }

        pub(crate) fn count(self) -> usize {
            1
        }

        /// Runs `work` once.
        pub(crate) fn each<T>(self, work: impl Fn() -> T) -> Vec<T> {
            vec![work()]
        }
    }
}
