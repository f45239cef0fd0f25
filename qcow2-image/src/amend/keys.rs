//! Key slots, as options say.

use super::{AmendError, AmendOptions, KeyChange};
use crate::Image;

impl Image {
    /// Judges the options for key slots; none is a change of nothing.
    pub(super) fn judge_keys(&self, options: &AmendOptions<'_>) -> Result<(), AmendError> {
        let keys = &options.keys;
        let refuse = |option, why: &str| Err(AmendError::refused(option, why));
        if !keys.is_any() {
            return Ok(());
        }
        let _ = self.key_slots()?;
        let new = keys.new_secret.is_some();
        let old = keys.old_secret.is_some();
        match keys.state {
            None => refuse("encrypt.state", "it must say what becomes of key slots"),
            Some(KeyChange::Active) if !new => {
                refuse("encrypt.new-secret", "a key slot needs a passphrase")
            }
            Some(KeyChange::Active) if old => {
                refuse("encrypt.old-secret", "it has no use where a slot is made")
            }
            Some(KeyChange::Active) if keys.secret.is_none() => refuse(
                "encrypt.new-secret",
                "the master key is only to be had with a passphrase that opens the image",
            ),
            Some(KeyChange::Inactive) if new => {
                refuse("encrypt.new-secret", "it has no use where slots are erased")
            }
            Some(KeyChange::Inactive) if keys.cost.is_some() => {
                refuse("encrypt.iter-time", "it has no use where slots are erased")
            }
            Some(KeyChange::Inactive) if !old && keys.slot.is_none() => refuse(
                "encrypt.state",
                "which slots are to be erased must be said: by number, or by passphrase",
            ),
            Some(_) => Ok(()),
        }
    }

    /// Changes key slots. Whatever is wrong is found before anything is written.
    pub(super) fn amend_keys(&self, options: &AmendOptions<'_>) -> Result<(), AmendError> {
        let keys = &options.keys;
        let Some(state) = keys.state else {
            return Ok(());
        };
        let slots = self.key_slots()?.limit(keys.limit).force(options.force);
        match (state, &keys.new_secret, &keys.secret) {
            (KeyChange::Active, Some(new), Some(secret)) => {
                let unlocked = self.unlock(secret, keys.limit)?;
                slots.add(&unlocked, new, keys.slot, keys.cost.unwrap_or_default())?;
            }
            _ => match (keys.slot, &keys.old_secret) {
                (Some(slot), old) => slots.erase(slot, old.as_deref())?,
                (None, Some(old)) => {
                    slots.erase_matching(old)?;
                }
                (None, None) => {}
            },
        }
        Ok(())
    }
}
