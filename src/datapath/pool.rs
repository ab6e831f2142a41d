//! Some of a kind, each of which one thread uses at a time: who asks for one waits for nobody while there are no more
//! of them.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

#[derive(Debug)]
pub(super) struct Pool<T, const N: usize>([Mutex<T>; N]);

impl<T, const N: usize> Pool<T, N> {
    /// # Errors
    /// When one cannot be made.
    pub(super) fn of<E>(mut make: impl FnMut() -> Result<T, E>) -> Result<Self, E> {
        const { assert!(N > 0) };
        let mut all = Vec::with_capacity(N);
        for _ in 0..N {
            all.push(Mutex::new(make()?));
        }
        Ok(Self(all.try_into().unwrap_or_else(|_| unreachable!("as many as these"))))
    }

    /// One that nobody uses now, if there is.
    pub(super) fn one(&self) -> MutexGuard<'_, T> {
        let free = self.0.iter().find_map(|one| match one.try_lock() {
            Ok(one) => Some(one),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        free.unwrap_or_else(|| self.0[0].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Each of them, when nobody uses it.
    pub(super) fn each(&self) -> impl Iterator<Item = MutexGuard<'_, T>> {
        self.0.iter().map(|one| one.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_used_by_one_at_a_time() {
        let mut made = 0;
        let pool: Pool<u8, 2> = Pool::of(|| {
            made += 1;
            Ok::<_, ()>(made)
        })
        .unwrap();
        let (a, b) = (pool.one(), pool.one());
        assert_ne!(*a, *b);
        let first = *a;
        drop((a, b));
        assert_eq!(*pool.one(), first);
        assert_eq!(pool.each().map(|n| *n).collect::<Vec<_>>(), [1, 2]);
        assert!(Pool::<u8, 2>::of(|| Err(())).is_err());
    }
}
