//! What `crate::fuzz` needs of a transfer.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::wire::*;
use crate::msgpack;
#[cfg(test)]
use crate::staging::digest::Digest;
#[cfg(test)]
use crate::staging::layout::FileSize;
use crate::staging::layout::Layout;

/// For `crate::fuzz`: a control frame of either side with what is packed in it, and the plan laid out.
pub(crate) fn fuzz(data: &[u8]) -> bool {
    fn again<T: Serialize + DeserializeOwned>(value: &T) {
        let first = rmp_serde::to_vec_named(value).expect("it was decoded");
        let second: T = msgpack::decode(&first).expect("own encoding");
        assert_eq!(first, rmp_serde::to_vec_named(&second).expect("it was decoded"));
    }
    let down = msgpack::decode::<FromSender>(data);
    if let Ok(down) = &down {
        again(down);
        match down {
            FromSender::Known(packed) => {
                if let Ok(known) = entries(packed) {
                    assert_eq!(pack_entries(&known), packed);
                }
            }
            FromSender::Plan { chunk, files, .. } => {
                if let Ok(layout) = Layout::new(*chunk, files.clone()) {
                    assert!(layout.segment_size() >= layout.bytes());
                    let last = layout.chunks() - 1;
                    let (file, from) = layout.locate(last);
                    assert_eq!(from + u64::from(layout.length(last)), layout.files()[file].size);
                }
            }
            _ => {}
        }
    }
    let up = msgpack::decode::<FromReceiver>(data);
    if let Ok(up) = &up {
        again(up);
        if let FromReceiver::Want(packed) = up
            && let Ok(wanted) = chunks(packed)
        {
            assert_eq!(pack_chunks(&wanted), packed);
        }
    }
    down.is_ok() || up.is_ok()
}

/// For `crate::fuzz`: control frames of both sides.
#[cfg(test)]
pub(crate) fn corpus() -> Vec<Vec<u8>> {
    let down = |frame: &FromSender| rmp_serde::to_vec_named(frame).unwrap();
    let up = |frame: &FromReceiver| rmp_serde::to_vec_named(frame).unwrap();
    let files = vec![FileSize { name: "model.safetensors".to_owned(), size: 10 << 20 }];
    let plan = |chunk, files| FromSender::Plan {
        version: VERSION,
        id: "u".to_owned(),
        node: "n".to_owned(),
        chunk,
        files,
    };
    vec![
        down(&plan(4 << 20, files.clone())),
        down(&plan(0, files)),
        down(&FromSender::Known(pack_entries(&[(0, Digest::of(b"a")), (7, Digest::of(b"b"))]))),
        down(&FromSender::AllKnown("digest".to_owned())),
        down(&FromSender::Ping),
        up(&FromReceiver::Accept { node: "n".to_owned() }),
        up(&FromReceiver::Want(pack_chunks(&[0, 1, 9]))),
        up(&FromReceiver::Done),
        up(&FromReceiver::Failed("no room".to_owned())),
    ]
}
