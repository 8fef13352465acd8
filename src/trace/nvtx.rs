//! Spans and marks as NVIDIA's tools show them, `nsys` for one: ranges in the domain `layer-streamer`, their categories the stages,
//! their payloads the units' bytes.
//!
//! Reads of neighbouring units overlap on one thread, and held layers end in any order: these are start/end ranges. Copies and
//! waits are push/pop ranges, since a thread has one of them at a time and ends it before the next: whoever adds a span within
//! such a span, or ends it in another thread, makes it a start/end range here.
//!
//! Every string is registered before anything streams, so a range allocates nothing. NVTX looks for a tool once per process;
//! where there is none, or it cannot be loaded, there is no [`Nvtx`] and a range costs a branch.

use std::{
    ffi::{CStr, CString},
    sync::OnceLock,
};

use nvtx_sys::{
    ColorType, DomainHandle, EventAttributes, MessageType, MessageValue, NVTX_EVENT_ATTRIBUTES_SIZE, NVTX_VERSION,
    PayloadType, PayloadValue, RangeId, StringHandle, domain_create_ascii, domain_mark_ex, domain_name_category_ascii,
    domain_range_end, domain_range_pop, domain_range_push_ex, domain_range_start_ex, domain_register_string_ascii,
    ffi::nvtxStringHandle_t,
};

use super::{About, Activity, Begun, Mark, Stage};

/// Work has its stage's colour, waits are grey (ARGB).
const STAGE_COLORS: [u32; 4] = [0xff4e_79a7, 0xfff2_8e2b, 0xff59_a14f, 0xffb0_7aa1];
const STARVED_COLOR: u32 = 0xffd4_d4d4;
const BLOCKED_COLOR: u32 = 0xff8c_8c8c;
const MARK_COLOR: u32 = 0xff1f_1f1f;
const FAILED_COLOR: u32 = 0xffe1_5759;

/// Messages that are no unit's name.
#[derive(Clone, Copy)]
enum Word {
    Starved,
    Blocked,
    PassBegins,
    PassEnds,
    Rewind,
    Cancelled,
    Late,
    Silent,
    Leaked,
}

impl Word {
    /// In the order of the variants.
    const ALL: [&CStr; 9] =
        [c"starved", c"blocked", c"pass begins", c"pass ends", c"rewind", c"cancelled", c"late", c"silent", c"leaked"];
}

/// What all streamers of a process share.
struct Domain {
    handle: DomainHandle,
    words: [StringHandle; Word::ALL.len()],
}

impl Domain {
    /// The domain, made when it is first asked for; `None` without a tool.
    fn get() -> Option<&'static Self> {
        static DOMAIN: OnceLock<Option<Domain>> = OnceLock::new();
        let make = || {
            let handle = domain_create_ascii(c"layer-streamer");
            let words = Word::ALL.map(|word| domain_register_string_ascii(handle, word));
            // A tool gives each string a handle.
            if words.iter().any(|word| nvtxStringHandle_t::from(*word).is_null()) {
                return None;
            }
            for (stage, name) in Stage::ALL.into_iter().zip([c"read", c"pin", c"transfer", c"compute"]) {
                domain_name_category_ascii(handle, category(stage), name);
            }
            Some(Self { handle, words })
        };
        DOMAIN.get_or_init(make).as_ref()
    }
}

/// 0 is no category.
fn category(stage: Stage) -> u32 {
    stage as u32 + 1
}

/// Where a streamer shows its spans and marks.
pub(super) struct Nvtx {
    domain: &'static Domain,
    /// By unit: its name.
    units: Box<[StringHandle]>,
}

impl Nvtx {
    /// Registers the units' names; `None` without a tool.
    pub(super) fn new(about: &About) -> Option<Self> {
        let domain = Domain::get()?;
        let register = |name: &str| domain_register_string_ascii(domain.handle, &c_string(name));
        Some(Self { domain, units: about.units.iter().map(|(name, ..)| register(name)).collect() })
    }

    /// Begins the range of a span; [`end`](Nvtx::end) takes the number.
    pub(super) fn begin(&self, span: &Begun) -> RangeId {
        let &Begun { stage, activity, bytes, .. } = span;
        let (message, color, payload) = match activity {
            Activity::Unit { unit, .. } => (self.units[unit], STAGE_COLORS[stage as usize], Some(bytes as u64)),
            Activity::Starved => (self.word(Word::Starved), STARVED_COLOR, None),
            Activity::Blocked => (self.word(Word::Blocked), BLOCKED_COLOR, None),
        };
        let range = attributes(category(stage), color, registered(message), payload);
        if is_nested(span) {
            domain_range_push_ex(self.domain.handle, &range);
            return 0;
        }
        domain_range_start_ex(self.domain.handle, &range)
    }

    /// Ends the range that began with `span`.
    pub(super) fn end(&self, span: &Begun, range: RangeId) {
        if is_nested(span) {
            domain_range_pop(self.domain.handle);
        } else {
            domain_range_end(self.domain.handle, range);
        }
    }

    pub(super) fn mark(&self, mark: &Mark) {
        let (word, payload) = match *mark {
            Mark::PassBegun { passes } => (Word::PassBegins, Some(passes)),
            Mark::PassEnded { passes } => (Word::PassEnds, Some(passes)),
            Mark::Rewind => (Word::Rewind, None),
            Mark::Cancelled => (Word::Cancelled, None),
            Mark::Late { unit } => (Word::Late, Some(unit as u64)),
            Mark::Silent { since, .. } => (Word::Silent, Some(since.as_nanos() as u64)),
            Mark::Leaked { bytes } => (Word::Leaked, Some(bytes as u64)),
            Mark::Failed(ref error) => {
                // An error has allocated already.
                let text = c_string(&format!("failed: {error}"));
                let message = (MessageType::NVTX_MESSAGE_TYPE_ASCII, MessageValue { ascii: text.as_ptr() });
                return domain_mark_ex(self.domain.handle, &attributes(0, FAILED_COLOR, message, None));
            }
        };
        let message = registered(self.word(word));
        domain_mark_ex(self.domain.handle, &attributes(0, MARK_COLOR, message, payload));
    }

    fn word(&self, word: Word) -> StringHandle {
        self.domain.words[word as usize]
    }
}

/// Whether the thread of the span has no other that ends later, and ends it itself.
fn is_nested(span: &Begun) -> bool {
    !matches!((span.activity, span.stage), (Activity::Unit { .. }, Stage::Read | Stage::Compute))
}

fn registered(message: StringHandle) -> (MessageType, MessageValue) {
    (MessageType::NVTX_MESSAGE_TYPE_REGISTERED, MessageValue { registered: message.into() })
}

fn attributes(
    category: u32,
    color: u32,
    (message_type, message): (MessageType, MessageValue),
    payload: Option<u64>,
) -> EventAttributes {
    let payload_type = match payload {
        Some(_) => PayloadType::NVTX_PAYLOAD_TYPE_UNSIGNED_INT64,
        None => PayloadType::NVTX_PAYLOAD_UNKNOWN,
    };
    EventAttributes {
        version: NVTX_VERSION as u16,
        size: NVTX_EVENT_ATTRIBUTES_SIZE as u16,
        category,
        colorType: ColorType::NVTX_COLOR_ARGB.into(),
        color,
        payloadType: payload_type.into(),
        reserved0: 0,
        payload: PayloadValue { ullValue: payload.unwrap_or(0) },
        messageType: message_type.into(),
        message,
    }
}

/// NVTX takes UTF-8, up to the first zero.
fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).expect("zeros were replaced")
}
