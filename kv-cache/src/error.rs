//! What the cache says to wrong input. No error changes the cache.

use crate::{BlockCount, BlockId, BlockSize, GroupId, PinId, SequenceId, TokenCount, TokenIndex};

/// Wrong input, with its numbers. "Not now" is not an error but [`Admission::Wait`](crate::Admission::Wait).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A block size of zero.
    #[error("a block must hold at least one token")]
    EmptyBlock,

    /// Too few or too many blocks to make a pool of. The null block counts as one.
    #[error("a pool has 2 to {max} blocks, the null block included, not {blocks}")]
    PoolSize {
        /// The number asked for.
        blocks: BlockCount,
        /// The most there can be.
        max: BlockCount,
    },

    /// The sequence was never opened, or has been closed.
    #[error("sequence {sequence} is not open")]
    NotOpen {
        /// The name given.
        sequence: SequenceId,
    },

    /// Another open sequence has this name.
    #[error("sequence {sequence} is already open")]
    AlreadyOpen {
        /// The name given.
        sequence: SequenceId,
    },

    /// More tokens than [`Config::sequence_tokens_max`](crate::Config::sequence_tokens_max).
    #[error("sequence {sequence} would know {tokens} tokens, {max} is the most")]
    TooManyTokens {
        /// Whose tokens.
        sequence: SequenceId,
        /// Tokens known already and tokens given, together.
        tokens: u64,
        /// The limit.
        max: TokenCount,
    },

    /// Cached prefixes are looked up before a sequence holds blocks, not after.
    #[error("sequence {sequence} holds {held} blocks already: a prefix is looked up before that")]
    Started {
        /// Who asked.
        sequence: SequenceId,
        /// Blocks it holds.
        held: BlockCount,
    },

    /// A table that ends before the tokens that a batch is to read or write.
    #[error("sequence {sequence} is to have {tokens} tokens, its blocks have room for {room}")]
    NoRoomFor {
        /// Whose table.
        sequence: SequenceId,
        /// Tokens up to the end of the step.
        tokens: TokenCount,
        /// Tokens that fit into its blocks.
        room: TokenCount,
    },

    /// A layout of 2^64 bytes or more.
    #[error("the layout takes 2^64 bytes or more")]
    LayoutTooLarge,

    /// A layout in which a block takes no room, so that any number of blocks would fit.
    #[error("a block of this layout takes no bytes: it has no layers, heads or numbers")]
    EmptyLayout,

    /// A place outside of a layer's array.
    #[error("the array has no block {block}, token {token}, part {part} and head {head}")]
    NoSuchPlace {
        /// The block asked for.
        block: u32,
        /// The token in it.
        token: u32,
        /// K or V.
        part: u32,
        /// The head.
        head: u32,
    },

    /// An item that overlaps the one before, is empty, or stands where a block is hashed already.
    #[error(
        "sequence {sequence} has an item of {tokens} tokens at {first}: items follow one another, the next from {free_from} on"
    )]
    Media {
        /// Whose item.
        sequence: SequenceId,
        /// Where it begins.
        first: TokenIndex,
        /// Its length.
        tokens: TokenCount,
        /// The first place it could stand.
        free_from: u64,
    },

    /// A claim for no new token.
    #[error("sequence {sequence} claims room for no new token")]
    EmptyClaim {
        /// Who asked.
        sequence: SequenceId,
    },

    /// A first claim that counts more tokens as computed than the cache can serve, or a count that is not
    /// a whole number of blocks.
    #[error(
        "sequence {sequence} counts {computed} tokens as computed: a first claim may count whole blocks, up to {cached} tokens"
    )]
    NotCached {
        /// Who asked.
        sequence: SequenceId,
        /// Tokens it takes for computed.
        computed: TokenCount,
        /// Tokens of the longest usable cached prefix.
        cached: TokenCount,
    },

    /// A claim that counts tokens as computed for which the sequence holds no block.
    #[error("sequence {sequence} counts {computed} tokens as computed, its blocks have room for {room}")]
    NoRoomBefore {
        /// Who asked.
        sequence: SequenceId,
        /// Tokens it takes for computed.
        computed: TokenCount,
        /// Tokens that fit into the blocks it holds.
        room: TokenCount,
    },

    /// A claim for tokens from elsewhere that lie in blocks which others can find already: a load would write there.
    #[error(
        "sequence {sequence} lets tokens come from elsewhere from {computed} on, others can find them up to {published}"
    )]
    AlreadyPublished {
        /// Who asked.
        sequence: SequenceId,
        /// Where the load would begin.
        computed: TokenCount,
        /// Tokens that the sequence has published.
        published: TokenCount,
    },

    /// A load is reported that was not claimed, or reaches past what was.
    #[error("sequence {sequence} reports {tokens} tokens as loaded, {from} to {to} are on their way")]
    NotLoading {
        /// Whose load.
        sequence: SequenceId,
        /// Tokens reported, from the beginning of the sequence.
        tokens: TokenCount,
        /// Tokens that were there before.
        from: TokenCount,
        /// Tokens that will be there after; equal to `from` when nothing is on its way.
        to: TokenCount,
    },

    /// A window or a chunk of zero tokens.
    #[error("attention reaches at least one token")]
    EmptyWindow,

    /// No group of layers, or too many.
    #[error("a cache has 1 to {max} groups, not {groups}")]
    GroupCount {
        /// The number asked for.
        groups: usize,
        /// The most there can be.
        max: usize,
    },

    /// A group that the cache does not have.
    #[error("there is no group {group}: they are {groups}, from 0")]
    NoSuchGroup {
        /// The number given.
        group: GroupId,
        /// How many there are.
        groups: usize,
    },

    /// A unit of sharing that does not divide the blocks of a group.
    #[error("blocks of {block_size} tokens cannot be shared in parts of {unit}")]
    MatchUnit {
        /// The unit asked for.
        unit: BlockSize,
        /// The block size.
        block_size: BlockSize,
    },

    /// Something that cannot be done to a sequence while some of its K and V are on their way.
    #[error("sequence {sequence} waits for its tokens {from} to {to}")]
    Loading {
        /// Whose load.
        sequence: SequenceId,
        /// Tokens that are there.
        from: TokenCount,
        /// Tokens that will be there.
        to: TokenCount,
    },

    /// Tokens are called settled that no claim was granted for.
    #[error("sequence {sequence} has {computed} tokens computed or under way, not {tokens}")]
    NotComputed {
        /// Whose tokens.
        sequence: SequenceId,
        /// Tokens called settled.
        tokens: TokenCount,
        /// Tokens of its claims.
        computed: TokenCount,
    },

    /// A sequence is to keep more tokens than it has, or to lose more.
    #[error("sequence {sequence} knows {known} tokens, {tokens} cannot be kept or taken from it")]
    PastTheStart {
        /// Whose tokens.
        sequence: SequenceId,
        /// Tokens to keep or to take.
        tokens: TokenCount,
        /// Tokens it knows.
        known: TokenCount,
    },

    /// A sequence cannot go on from a place where a group has given back what would be needed there.
    #[error(
        "sequence {sequence} cannot go back to {tokens} tokens of {computed}: blocks of group {group} are gone"
    )]
    Gone {
        /// Which sequence.
        sequence: SequenceId,
        /// Where it was to go on from.
        tokens: TokenCount,
        /// Tokens computed.
        computed: TokenCount,
        /// The group.
        group: GroupId,
    },

    /// A block that the pool does not have, or the null block.
    #[error("there is no block {block}: they are 1 to {last}")]
    NoSuchBlock {
        /// The number given.
        block: BlockId,
        /// The last block.
        last: BlockId,
    },

    /// No pin has this name, or it has expired.
    #[error("there is no pin {pin}")]
    NoSuchPin {
        /// The name given.
        pin: PinId,
    },
}
